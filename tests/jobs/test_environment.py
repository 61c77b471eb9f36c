"""Variables: what workers of a cluster get, and that secrets stand in nothing that is written."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jobs import submit
from jobs.environment import (
    ENVIRONMENT,
    JOB_CONFIG,
    SECRETS_FILE,
    TAKE_SECRETS,
    hide_secrets,
    take_secrets,
    worker_environment,
)
from jobs.submission import cluster, package
from jobs.submission.follow import LogPrinter, follow
from pipelines import redaction
from pipelines.config.checks import changed_fields, to_dict
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError
from tests.pipelines.pretrain_fixtures import make_tables, small_config

REPOSITORY = Path(__file__).parents[2]
SECRETS = {
    name: f"planted-{number}-geheim"
    for number, name in enumerate(
        ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN",
         "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN",
         "AZURE_STORAGE_ACCOUNT_KEY", "HF_TOKEN", "MY_PASSPHRASE")
    )
}  # fmt: skip


@pytest.fixture
def shell(monkeypatch):
    """A shell with secrets in it, and nothing known of them yet."""
    monkeypatch.setattr(redaction, "_KNOWN", set())
    for name in (*ENVIRONMENT, "BEIT_ENV", JOB_CONFIG):
        monkeypatch.delenv(name, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_workers_get_what_every_command_sets_and_what_is_named(shell):
    shell.setenv("RAY_worker_niceness", "5")
    shell.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    shell.setenv("BEIT_ENV", "AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD")
    assert worker_environment() == {
        "RAY_worker_niceness": "5",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "7",
        "AWS_SECRET_ACCESS_KEY": SECRETS["AWS_SECRET_ACCESS_KEY"],
        "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_TRACKING_PASSWORD"],
    }
    # What the job says itself must not be said again: Ray would refuse, and print all values.
    shell.setenv(
        JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": {"RAY_worker_niceness": "0"}}})
    )
    assert "RAY_worker_niceness" not in worker_environment()
    shell.setenv("BEIT_ENV", "NOT_SET")
    with pytest.raises(InputError, match="BEIT_ENV NOT_SET"):
        worker_environment()


def test_values_of_secret_variables_are_taken_out_of_any_text(shell):
    shell.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    shell.setenv("SHORT_TOKEN", "abc")
    shell.setenv("AWS_PROFILE", "research")
    shell.setenv("MY_TOKEN", str(REPOSITORY))
    shell.setenv("PWD", "/home/research")
    shell.setenv("TOKENIZER", "research")
    shell.setenv("BEIT_TOKENS", "research")
    hide_secrets()
    plain = f"/var/run/token abc research {REPOSITORY}"
    text = redaction.redacted_text(" ".join([*SECRETS.values(), plain]))
    assert text == " ".join([redaction.HIDDEN] * len(SECRETS)) + f" {plain}"


def test_records_lose_the_secrets_of_uris_and_nothing_else(shell):
    """A value that a variable has, too, may be a directory: a resumed run must read it again."""
    shell.setenv("TEAM_TOKEN", "research")
    hide_secrets()
    record = {
        "images": "/data/research/images", "message": "refused: research",
        "tracking": {"uri": "http://anna:geheim@mlflow:5000/research?api_key=geheim&a=b"},
        "tokens": ["s3://b/t?secret=geheim&endpoint_override=http%3A%2F%2Fanna%3Ageheim%40s3"],
        "source": "https://s3/x.tar?X-Amz-Credential=geheim&X-Amz-Signature=geheim&key=geheim",
    }  # fmt: skip
    assert redaction.redacted_values(record) == {
        "images": "/data/research/images", "message": "refused: ***",
        "tracking": {"uri": "http://***@mlflow:5000/research?api_key=***&a=b"},
        "tokens": ["s3://b/t?secret=***&endpoint_override=http%3A%2F%2F***%40s3"],
        "source": "https://s3/x.tar?X-Amz-Credential=***&X-Amz-Signature=***&key=***",
    }  # fmt: skip
    images = "memory://b/i?secret=geheim"
    config = PretrainConfig(name="research", images=images, output="/o")
    assert changed_fields(redaction.redacted_values(to_dict(config)), config) == {}
    other = dataclasses.replace(config, name="other")
    assert changed_fields(redaction.redacted_values(to_dict(config)), other) == {
        "name": ("research", "other")
    }


def test_a_submission_hands_secrets_over_in_one_file_alone(shell, tmp_path, capsys):
    sent = {}

    def take(client, **job):
        folder = Path(job["runtime_env"]["working_dir"])
        files = {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
        assert (folder / SECRETS_FILE).stat().st_mode & 0o777 == 0o600
        sent.update(job, secrets=files.pop(SECRETS_FILE), files=files.values())

    shell.setattr(cluster, "connect", lambda *_: None)
    shell.setattr(cluster, "newest_attempt", lambda *_: (0, None))
    shell.setattr(cluster, "submit", take)
    flags = ["--source", "s3://raw/x", "--output", "s3://beit/y?secret_key=planted-11-geheim",
             "--tracking.uri", "http://anna:planted-12-geheim@mlflow:5000"]  # fmt: skip
    shell.setenv("MLFLOW_TRACKING_URI", "http://anna:planted-13-geheim@mlflow:5000")
    shell.setenv("AWS_PROFILE", "research")
    given = [*SECRETS, "MLFLOW_TRACKING_URI", "AWS_PROFILE"]
    names = [word for name in given for word in ("--env", name)]
    shell.setattr(submit, "_report", lambda *_, **__: 0)
    line = ["prepare", "--address", "http://h:8265", "--detach", "--code", "image", *names, "--"]
    assert submit.main([*line, *flags]) == 0
    by_uri = {"MLFLOW_TRACKING_URI": "http://anna:planted-13-geheim@mlflow:5000"}
    assert json.loads(sent["secrets"]) == SECRETS | by_uri
    # Ray writes a job's runtime environment into logs, and shows it.
    environment = sent["runtime_env"]
    assert environment["env_vars"]["AWS_PROFILE"] == "research"
    assert environment["worker_process_setup_hook"] == TAKE_SECRETS
    told = capsys.readouterr()
    for place in (sent["entrypoint"], sent["submission_id"], str(sent["metadata"]),
                  str(environment), *told):  # fmt: skip
        assert "geheim" not in place
    # The configuration is what the job connects by: it holds what the user put into URIs, no more.
    assert not any(secret in text for secret in SECRETS.values() for text in sent["files"])
    record = submit._record(SimpleNamespace(**{
        "submission_id": "x", "status": SimpleNamespace(value="RUNNING"), "start_time": 0,
        "metadata": sent["metadata"], "driver_exit_code": None,
        "runtime_env": sent["runtime_env"],
    }))  # fmt: skip
    assert "geheim" not in json.dumps(record)


def test_secrets_are_taken_from_the_file_of_the_job(shell, tmp_path):
    shell.chdir(tmp_path)
    shell.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError):
        take_secrets()
    Path(SECRETS_FILE).write_text(json.dumps({"HF_TOKEN": "geheim"}))
    module, _, name = TAKE_SECRETS.rpartition(".")
    getattr(importlib.import_module(module), name)()
    assert os.environ["HF_TOKEN"] == "geheim"


CRASH = """
import os, sys
from pipelines import pretrain
from jobs.cli import main
real = pretrain.run
def run(config):
    real(config)
    raise RuntimeError(f"refused: {os.environ['AWS_SECRET_ACCESS_KEY']}")
pretrain.run = run
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


def test_secrets_stand_nowhere_after_a_run_and_its_crash(shell, tmp_path):
    tables = make_tables(tmp_path / "tables")
    config = small_config(
        tables, str(tmp_path / "run"), optim={"steps": 4}, scaling={"num_workers": 0},
        tracking={"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(config)))
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "--config", str(recipe)],
        cwd=REPOSITORY, text=True, capture_output=True, check=False,
        env={**os.environ, "BEIT_JOB": "job", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: refused: ***" in done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in written} | {path.name for path in written}
    assert {"mlflow.db", "run.result.json", ".log", "config.yaml", "report.json"} <= kinds
    leaks = [str(path) for path in written if b"geheim" in path.read_bytes()]
    assert leaks == []
    assert "geheim" not in done.stdout + done.stderr


ASK = """
import os, ray
from jobs.command import connect_to_ray
from jobs.environment import prepare_environment
prepare_environment()
connect_to_ray()
ask = ray.remote(num_cpus=0)(lambda: dict(os.environ))
seen = ray.get(ask.remote())
for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "RAY_worker_niceness", "HF_TOKEN", "MY_PASSPHRASE"):
    print(name, seen.get(name))
"""


@pytest.mark.long
def test_workers_of_a_cluster_that_others_started_have_them(ray_turn, shell, tmp_path):
    from ray.cluster_utils import Cluster

    shell.delenv("HF_TOKEN")
    shell.delenv("RAY_AUTH_TOKEN")
    shell.delenv("MY_PASSPHRASE")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], cwd=REPOSITORY, text=True, capture_output=True,
            check=False,
            env={**os.environ, "RAY_ADDRESS": started.address, "BEIT_ENV": "HF_TOKEN",
                 "HF_TOKEN": "named-geheim", "MY_PASSPHRASE": "not-named"},
        )  # fmt: skip
    finally:
        started.shutdown()
    assert done.stdout.splitlines() == [
        "MLFLOW_HTTP_REQUEST_TIMEOUT 20", "RAY_worker_niceness 0", "HF_TOKEN named-geheim",
        "MY_PASSPHRASE None",
    ], done.stderr  # fmt: skip


ASK_JOB = """
import os, ray
from jobs.environment import take_secrets
take_secrets()
ray.init(address="auto", runtime_env={"env_vars": {"MORE": "1"}})
ask = ray.remote(num_cpus=0)(lambda: sorted(name for name in os.environ if name in NAMES))
NAMES = %s
print("driver has", sum(name in os.environ for name in NAMES))
print("worker has", len(ray.get(ask.remote())))
"""


@pytest.mark.long
def test_secrets_of_a_job_reach_its_workers_and_stand_in_nothing_else(
    ray_turn, shell, tmp_path, capsys
):
    """Ray's logs and metadata, what a submitted stage writes, and what its client shows."""
    from ray.cluster_utils import Cluster

    for name in SECRETS:
        shell.delenv(name)
    shell.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True}
    )
    address = f"http://{started.head_node.webui_url}"
    session = Path(started.head_node.get_session_dir_path())
    asking, made = tmp_path / "asking", tmp_path / "made"
    asking.mkdir()
    package.write_package(asking, config_text="{}", with_code=True, include=[], secrets=SECRETS)
    (asking / "ask.py").write_text(ASK_JOB % repr(tuple(SECRETS)))
    names = [word for name in SECRETS for word in ("--env", name)]
    flags = ["--source", str(REPOSITORY / "tests/data/v0.1.0/source")]
    flags += ["--output", f"{made}/images", "--tracking.uri", f"sqlite:///{made}/mlflow.db"]
    try:
        client = cluster.connect(address, "")
        cluster.submit(
            client, entrypoint=f"{sys.executable} ask.py", submission_id="ask", metadata={},
            runtime_env={"working_dir": str(asking), "worker_process_setup_hook": TAKE_SECRETS},
        )  # fmt: skip
        ended = follow(client, "ask", LogPrinter(sys.stdout))
        for name, value in SECRETS.items():
            shell.setenv(name, value)
        code = submit.main(["prepare", "--address", address, *names, "--", *flags])
        jobs = str(client.list_jobs())
    finally:
        started.shutdown()
    told = capsys.readouterr()
    assert ended.status.value == "SUCCEEDED", told
    assert f"driver has {len(SECRETS)}" in told.out
    assert f"worker has {len(SECRETS)}" in told.out
    assert code == 0, told
    files = [path for place in (session, made) for path in place.rglob("*") if path.is_file()]
    kinds = {path.name.partition("-")[0] for path in files}
    assert {"manifest.json", "mlflow.db", "images.result.json", "runtime_env_setup"} <= kinds
    leaks = {path.name for path in files if b"geheim" in path.read_bytes()}
    assert leaks == {SECRETS_FILE}
    assert "geheim" not in jobs + told.out + told.err
