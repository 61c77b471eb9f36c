"""The record of a training is true whatever dies: on MLflow, PostgreSQL and S3 that are real.

Two drivers are killed, one is asked to end, the server is away for 20 s and then dead at the end;
`beit sync` makes the run whole.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from jobs.environment import ENVIRONMENT
from pipelines import pretrain, storage
from pipelines.config.checks import to_dict
from pipelines.config.tracking import TrackingConfig
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tracking.filler import known_pictures, metric_name
from pipelines.tracking.spool import Place, Spool
from pipelines.training import data as train_data
from pipelines.training.run_dir import RunDir
from tests.pipelines.pretrain_fixtures import make_tables, metrics_of, small_config
from tests.pipelines.tracking_fixtures import dataset, start
from tests.s3_server import ACCESS_KEY, REGION, SECRET_KEY, start_s3
from tests.servers import mlflow_server, postgres_program, postgres_server, running

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not postgres_program("initdb"), reason="PostgreSQL is not installed"),
]
REPOSITORY = Path(__file__).parents[2]
STEPS, WAIT = 240, 300.0
TRAIN_LOOP = pretrain.train_loop
DRIVER = """
import sys
import tests.conftest
from pipelines import pretrain
from tests.pipelines.test_record import paced_loop
pretrain.train_loop = paced_loop
from jobs.cli import main
sys.exit(main(sys.argv[1:]))
"""


def paced_loop(config, plan, world, log):
    """`train_loop` at a pace at which it can be killed; it stands while there is a file `hold`."""
    real, hold = train_data.WorkerData.batches, Path(config.output).with_name("hold")

    def paced(self, segments):
        for batch in real(self, segments):
            time.sleep(0.05)
            while hold.exists():
                time.sleep(0.1)
            yield batch

    train_data.WorkerData.batches = paced
    try:
        TRAIN_LOOP(config, plan, world, log)
    finally:
        train_data.WorkerData.batches = real


class Driver:
    """`beit pretrain` in a process of its own."""

    def __init__(self, directory: Path):
        self.directory, self.run = directory, str(directory / "run")
        self.errors = directory / "stderr"

    @contextlib.contextmanager
    def at_work(self, until_step):
        """The process, when it has logged that step; whatever is left of it is killed."""
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, "pretrain", "--config", "recipe.yaml"],
                cwd=self.directory, stdout=errors, stderr=errors, start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip
        below = []
        try:
            self.wait_for(lambda: self.step() >= until_step and process.poll() is None, process)
            below = psutil.Process(process.pid).children(recursive=True)
            yield process
        finally:
            # Its Ray dies with it, but only when it notices.
            for one in [process, *below]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()
            process.wait()
            psutil.wait_procs(below, timeout=10)

    def wait_for(self, condition, process=None):
        deadline = time.monotonic() + WAIT
        while not condition():
            alive = process is None or process.poll() is None
            assert alive and time.monotonic() < deadline, self.errors.read_text()[-4000:]
            time.sleep(0.05)

    def step(self):
        """Newest step of metrics.jsonl."""
        try:
            return max((line["step"] for line in metrics_of(self.run)), default=-1)
        except (FileNotFoundError, ValueError):  # not there yet; a line in the making
            return -1


@pytest.fixture(scope="module", name="server")
def server_fixture(tmp_path_factory):
    s3 = start_s3()
    bucket = s3.new_bucket()
    with (
        postgres_server() as store,
        running(
            mlflow_server(
                tmp_path_factory.mktemp("server"),
                store,
                f"s3://{bucket}/artifacts",
                MLFLOW_S3_ENDPOINT_URL=s3.endpoint,
                AWS_ACCESS_KEY_ID=ACCESS_KEY,
                AWS_SECRET_ACCESS_KEY=SECRET_KEY,
                AWS_DEFAULT_REGION=REGION,
                MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            )
        ) as server,
    ):
        server.stored_files = functools.partial(
            s3.client().list_objects_v2, Bucket=bucket, Prefix="artifacts/"
        )
        yield server


def test_without_ray(server, tmp_path):
    check_record(server, tmp_path, workers=0)


def test_with_two_ray_workers(server, tmp_path, ray_turn):
    check_record(server, tmp_path, workers=2)


def check_record(server, tmp_path, *, workers):
    uri = f"http://127.0.0.1:{server.port}"
    name = f"beit-{workers}"
    tracking = TrackingConfig(uri=uri, experiment=name, registered_model=name)
    tables = make_tables(tmp_path / "tables")
    record_makers(tracking, tables)
    config = small_config(
        tables, str(tmp_path / "run"), optim={"steps": STEPS, "warmup_steps": 2}, log_every=2,
        scaling={"num_workers": workers, "stall_factor": 1e4}, pictures_every=40,
        probe={"images": tables[0], "every_steps": 60, "max_share": 1.0}, tracking=vars(tracking),
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(config)))
    driver, client = Driver(tmp_path), MlflowClient(uri)
    for step in (30, 70):
        with driver.at_work(step) as process:
            process.kill()
    with driver.at_work(110) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 130, driver.errors.read_text()[-4000:]
    run_id = RunDir(driver.run).record()["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    with driver.at_work(140) as process:
        away_then_back(server, driver, process, client, run_id)
        server.kill()
        driver.directory.joinpath("hold").unlink()
        assert process.wait(WAIT) == 0, driver.errors.read_text()[-4000:]
    assert f"beit sync {driver.run}" in driver.errors.read_text()
    server.start()
    assert client.get_run(run_id).info.status == "RUNNING"
    command = [sys.executable, "-m", "jobs.cli", "sync", driver.run]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    check_whole(client, run_id, driver.run)
    check_model(uri, name, tables, server)


def away_then_back(server, driver, process, client, run_id):
    """The server is away for 20 s of training; then it gets what it has missed."""
    server.kill()
    began, step = time.monotonic(), driver.step()
    driver.wait_for(lambda: driver.step() >= step + 20, process)  # training goes on
    driver.directory.joinpath("hold").touch()
    time.sleep(max(0.0, 20 - (time.monotonic() - began)))
    server.start()
    newest = driver.step() + 1  # MLflow counts steps that are done
    driver.wait_for(lambda: newest in steps_of(client, run_id, "loss"), process)


def record_makers(tracking, tables):
    """The runs that made the tables, so that lineage has no gap."""
    images, tokens = ImageTable.open(tables[0]), TokenTable.open(tables[1])
    made = dataset("image_table", images.fingerprint, uri=tables[0])
    tokenizer = dataset("tokenizer", tokens.tokenizer_fingerprint)
    with start(tracking, stage="prepare") as run:
        run.set_output(made)
    with start(tracking, stage="train-tokenizer", inputs=[made]) as run:
        run.set_output(tokenizer)
    with start(tracking, stage="tokenize", inputs=[made, tokenizer]) as run:
        run.set_output(dataset("token_table", tokens.fingerprint, uri=tables[1]))


def steps_of(client, run_id, name):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def check_whole(client, run_id, uri):
    """One finished run with every line once, and all pictures and files."""
    run = client.get_run(run_id)
    found = client.search_runs([run.info.experiment_id], "tags.`beit.stage` = 'pretrain'")
    assert [one.info.run_id for one in found] == [run_id]
    assert run.info.status == "FINISHED"
    assert "beit.error" not in run.data.tags
    spool, name = Spool(uri), "metrics.jsonl"
    size = len(storage.read_bytes(spool.at(name)))
    lines = list(spool.values_after(name, Place(), size=size)[0])
    assert [line.step for line in lines] == list(range(2, STEPS + 1, 2))
    for name in {name for line in lines for name in line.metrics}:
        of_lines = {line.step: line.metrics[name] for line in lines if name in line.metrics}
        stored = client.get_metric_history(run_id, metric_name(name))
        assert sorted(one.step for one in stored) == sorted(of_lines), name
        if name == "loss":  # what depends on time is of the first time that a step was done
            assert {one.step: one.value for one in stored} == pytest.approx(of_lines)
    for name in ("probe/linear_accuracy", "probe/knn_accuracy"):
        assert sorted(steps_of(client, run_id, name)) == [60, 120, 180, 240]
    pictures = {(metric_name(key), step) for key, step, _ in spool.pictures()}
    assert {step for _, step in pictures} >= {40, 80, 120, 160, 200, 240}
    assert known_pictures(client, run_id) == pictures
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.yaml", "report.json", "figures", "images"} <= files


def check_model(uri, name, tables, server):
    """The registered model loads in a process of its own, and its lineage reaches the images."""
    code = (
        "import mlflow, numpy as np, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        "model = mlflow.pyfunc.load_model(sys.argv[2]); "
        "print(model.predict(np.zeros((2, 40, 50, 3), np.uint8)).shape)"
    )
    model = f"models:/{name}/1"
    done = subprocess.run(
        [sys.executable, "-c", code, uri, model],
        cwd="/",
        text=True,
        capture_output=True,
        check=True,
    )
    assert "(2, 32)" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "lineage", model, "--tracking.uri", uri],
        cwd=REPOSITORY, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ImageTable.open(tables[0]).fingerprint[:12] in done.stdout
    keys = [one["Key"] for one in server.stored_files()["Contents"]]
    assert any(key.endswith("weights.safetensors") for key in keys)
