"""The Slurm script on a real Slurm of two nodes: begun, cancelled, queued again, finished."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.infra import slurm as own_slurm

SCRIPT = str(own_slurm.REPOSITORY / "infra/slurm/beit.sbatch")
DATA = own_slurm.REPOSITORY / "tests/data/v0.1.0"
# A worker takes all of a node.
RECIPE = f"""
log_every: 5
model: {{image_size: 32, patch_size: 8, dim: 16, depth: 2, num_heads: 2}}
masking: {{num_masked: 6, min_block: 3}}
data: {{global_batch_size: 16, num_shards: 4, window: 8}}
optim: {{steps: 200, warmup_steps: 2, lr: 3.0e-3}}
scaling: {{num_workers: 2, cpus_per_worker: {os.cpu_count()}, peak_tflops: 0.05}}
checkpoint: {{every_steps: 100000}}
health: {{data_starvation: "off", accuracy_floor: "off"}}
"""
SECONDS = 1200


@pytest.fixture(scope="module")
def slurm(ray_turn, tmp_path_factory):
    if os.geteuid() or own_slurm.missing():
        pytest.skip(f"{own_slurm.__doc__} Missing: {own_slurm.missing()}")
    with own_slurm.started(tmp_path_factory.mktemp("s"), count=2) as running:
        shutil.copytree(DATA, running.home / "data")
        (running.home / "pretrain.yaml").write_text(RECIPE)
        yield running


def submit(slurm, *flags, nodes=2):
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(own_slurm.REPOSITORY),
        "HOME": "/tmp/home",
    }
    options = ["--parsable", f"--chdir={slurm.home}", f"--nodes={nodes}"]
    return slurm.run("sbatch", *options, SCRIPT, *flags, environment=environment)


def until(condition, slurm, job):
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up, slurm.log(job)
        assert slurm.state(job).split()[0] in ("PENDING", "RUNNING"), slurm.log(job)
        time.sleep(0.2)


def result_of(run):
    return json.loads(run.with_name("run.result.json").read_text())


def steps_of(run):
    """Steps that were done when each line was logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if run.exists() else []
    return [json.loads(line)["step"] + 1 for line in lines]


def ray_processes(slurm):
    """Lines of processes of Ray on all nodes."""
    script = "ps -e -o comm= | grep -cE 'raylet|gcs_server' || true"
    return slurm.run("srun", "--nodes=2", "sh", "-c", script).split()


# In place of Slurm's and Ray's programs: what they do with their arguments, and no more.
PROGRAMS = {
    "srun": 'shift; SLURM_NODEID=0 exec "$@"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"; code=$?\n'
    'echo "2026 INFO scripts.py:1421 -- Send"; exit $code',
    "scontrol": '[ "$1" = show ] && echo node1 || echo "$@" >requeued',
    "beit": "trap 'echo saved; exit 130' TERM; echo \"$RAY_ADDRESS $*\"; touch begun\n"
    '[ "$1" = wait ] || exit "$1"; while :; do sleep 0.05; done',
}


@pytest.mark.parametrize(
    ("flags", "sent", "code", "requeued"),
    [
        (["0"], None, 0, False),
        (["2"], None, 2, False),
        (["wait"], signal.SIGTERM, 130, False),  # scancel
        (["wait"], signal.SIGUSR1, 0, True),  # the time limit comes near
        (["0"], signal.SIGUSR1, 0, True),  # before the stage has begun
        ([], None, 2, False),
    ],
)
def test_the_script_asks_the_stage_alone_to_end(flags, sent, code, requeued, tmp_path):
    early = sent is not None and flags == ["0"]
    for name, body in PROGRAMS.items():
        slow = "until [ -e go ]; do sleep 0.05; done\n" if early and name == "ray" else ""
        (tmp_path / name).write_text(f"#!/bin/bash\n{slow}{body}\n")
        (tmp_path / name).chmod(0o755)
    job = str(os.getpid())
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job}
    environment |= {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    process = subprocess.Popen(
        ["bash", SCRIPT, *flags], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if sent is not None:
        give_up = time.monotonic() + 20
        while not (tmp_path / "begun").exists() and time.monotonic() < give_up and not early:
            time.sleep(0.02)
        time.sleep(0.5 if early else 0)
        process.send_signal(sent)
        time.sleep(0.2)
        (tmp_path / "go").touch()
    told, _ = process.communicate(timeout=20)
    assert process.returncode == code, told
    assert (tmp_path / "requeued").exists() == requeued
    assert "scripts.py" not in told  # what Ray says of its own end
    if early:
        assert not (tmp_path / "begun").exists()
    elif flags:
        assert f"node1:{20000 + int(job) % 20000} {flags[0]}" in told
        assert ("saved" in told) == (sent is not None)
    assert not list(Path("/tmp").glob(f"beit-{job}.pid*"))


@pytest.mark.long
@pytest.mark.timeout(4200)
def test_a_run_is_cancelled_continued_queued_again_and_finished(slurm):
    home, run = slurm.home, slurm.home / "run"
    store = home / "mlflow.db"
    flags = ["pretrain", "--config", f"{home}/pretrain.yaml", "--images", f"{home}/data/images"]
    flags += ["--tokens", f"{home}/data/tokens", "--output", str(run)]
    flags += ["--tracking.uri", f"sqlite:///{store}"]

    def statuses():
        with sqlite3.connect(store) as database:
            return database.execute("select status from runs").fetchall()

    # `scancel` reaches the batch script and the tasks: the stage alone ends, saves, and says so.
    job = submit(slurm, *flags)
    until(lambda: run.joinpath("metrics.jsonl").exists() and steps_of(run), slurm, job)
    slurm.run("scancel", job)
    assert slurm.wait(job, "CANCELLED", seconds=120).endswith("restarts 0")
    result = result_of(run)
    assert result["exit_code"] == 130, slurm.log(job)
    saved = steps_of(run)[-1]
    assert f"saved at step {saved} of 200" in result["cause"]
    assert statuses() == [("KILLED",)]

    # What a time limit sends: saved, queued again, finished by the same run.
    job = submit(slurm, *flags)
    until(lambda: steps_of(run)[-1] > saved, slurm, job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: "restarts 1" in slurm.state(job), slurm, job)
    assert steps_of(run)[-1] < 200, "the run is too short for this test"
    assert result_of(run)["exit_code"] == 130
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=SECONDS) == "COMPLETED 0:0 restarts 1"
    assert statuses() == [("FINISHED",)]
    steps = steps_of(run)
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
    assert (run / "weights/config.json").is_file()
    attempts = [json.loads(path.read_text()) for path in sorted(run.glob("attempts/*.json"))]
    assert len(attempts) == 3
    assert [attempt["workers"] for attempt in attempts] == [2, 2, 2]
    assert ray_processes(slurm) == ["0", "0"]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_bad_input_ends_with_its_code_and_is_not_queued_again(slurm):
    flags = ["prepare", "--source", "/not/there", "--output", f"{slurm.home}/images"]
    job = submit(slurm, *flags, "--tracking.enabled", "false", nodes=1)
    ended = slurm.wait(job, "COMPLETED", "FAILED", seconds=SECONDS)
    assert ended == "FAILED 2:0 restarts 0", slurm.log(job)
    assert "/not/there" in slurm.log(job)
