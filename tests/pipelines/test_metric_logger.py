"""A logger that survives its process, its server and its caller, against a real MLflow store."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.config.tracking import TrackingConfig
from pipelines.tracking.metric_logger import MetricLogger, known_pictures
from tests.pipelines.tracking_fixtures import (  # noqa: F401 - fixtures
    REPOSITORY,
    config_fixture,
    free_port,
    start,
    steps,
)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_a_killed_worker_leaves_every_step_once(config):
    """SIGKILL at step 40, continued from a checkpoint of step 25 in a new process."""
    run = start(config)
    program = f"""
        import os, signal, sys, time
        from pipelines.tracking.metric_logger import MetricLogger
        first, last, kill = (int(value) for value in sys.argv[1:])
        logger = MetricLogger({run.tracking_uri!r}, {run.run_id!r}, flush_every=0.05)
        for step in range(first, last):
            logger.log({{"loss": 1 / (1 + step)}}, step)
            time.sleep(0.01)
        if kill:
            while logger._entries or logger._sending:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        logger.close()
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    killed = subprocess.run([*command, "0", "40", "1"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([*command, "25", "60", "0"], env=environment, check=True)
    run.finish()
    assert steps(MlflowClient(config.uri), run, "loss") == list(range(60))


def test_logging_without_a_server_neither_waits_nor_grows(caplog):
    logger = MetricLogger(f"http://127.0.0.1:{free_port()}", "0" * 32, capacity=100)
    begin = time.monotonic()
    for step in range(5000):
        logger.log({"loss": 1.0, "lr": 0.1}, step)
        if step % 1000 == 0:
            logger.log({"probe": 0.5}, step)
        logger.log_image("picture", Image.new("RGB", (8, 8)), step)
    assert time.monotonic() - begin < 5
    assert len(logger._entries) <= 100
    kept = [entry for entry in logger._entries if "probe" in entry.metrics]
    assert [entry.step for entry in kept] == [0, 1000, 2000, 3000, 4000]
    last = [entry.step for entry in logger._entries if "loss" in entry.metrics]
    assert last == sorted(last)
    assert last[-1] >= 4990
    begin = time.monotonic()
    logger.close(timeout=1)
    assert time.monotonic() - begin < 5
    assert logger.dropped == 5005 + 5000  # all of it, told at the end
    assert "records lost" in caplog.text


def test_values_that_are_no_numbers_are_counted_not_raised(config, caplog):
    run = start(config)
    logger = MetricLogger(run.tracking_uri, run.run_id)
    logger.log({"loss": "high"}, 1)
    logger.log({"loss": float("nan")}, 2)
    logger.log({"loss": float("inf")}, 3)
    logger.log({"loss": 4.0}, 4)
    logger.close()
    run.finish()
    assert logger.dropped == 1
    assert "step 1 not recorded" in caplog.text
    assert steps(MlflowClient(config.uri), run, "loss") == [2, 3, 4]


def test_values_for_a_run_that_does_not_exist_are_given_up(config):
    logger = MetricLogger(config.uri, "0" * 32, flush_every=0.05)
    logger.log({"loss": 1.0}, 1)
    logger.close(timeout=5)
    assert logger.dropped == 1


def test_system_metrics_of_a_machine_continue_after_a_restart(config, monkeypatch):
    from pipelines.tracking import metric_logger

    monkeypatch.setattr(metric_logger._SystemSampler, "sample_every", 0.05)
    monkeypatch.setattr(metric_logger._SystemSampler, "publish_every", 0.1)
    run = start(config)
    client = MlflowClient(config.uri)
    for least in (2, 4):
        logger = MetricLogger(run.tracking_uri, run.run_id, system_metrics=True, flush_every=0.05)
        wait_until(
            lambda least=least: (
                len(steps(client, run, "system/cpu_utilization_percentage")) >= least
            )
        )
        logger.close()
    run.finish()
    found = steps(client, run, "system/cpu_utilization_percentage")
    assert found == list(range(len(found)))
    names = client.get_run(run.run_id).data.metrics
    assert "system/system_memory_usage_megabytes" in names


@pytest.mark.slow
def test_a_real_server_may_go_and_come_back(empty_store, tmp_path, caplog):
    """Training logs on while the server is dead; all steps are there once it is back."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"

    def serve():
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
             "--artifacts-destination", str(tmp_path / "served")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_until(lambda: answers(port), 120)
        return server

    def kill(server):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    server = serve()
    try:
        run = start(TrackingConfig(uri=uri))
        assert run.url.startswith(f"{uri}/#/experiments/")
        assert run.url.endswith(f"/runs/{run.run_id}?workflowType=machine_learning")
        run.log_artifact_file("note.txt", b"through the proxy")
        run.log_image("picture", Image.new("RGB", (16, 16)), 1)
        logger = MetricLogger(run.tracking_uri, run.run_id, flush_every=0.1)
        client = MlflowClient(uri)
        for step in range(10):
            logger.log({"loss": float(step)}, step)
        wait_until(lambda: len(steps(client, run, "loss")) == 10)
        kill(server)
        for step in range(10, 30):
            begin = time.monotonic()
            logger.log({"loss": float(step)}, step)
            assert time.monotonic() - begin < 0.5
        server = serve()
        logger.close(timeout=120)
        run.finish()
        assert logger.dropped == 0
        assert steps(client, run, "loss") == list(range(30))
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert known_pictures(client, run.run_id) == {("picture", 1)}
        assert {file.path for file in client.list_artifacts(run.run_id)} == {"images", "note.txt"}
    finally:
        kill(server)


def answers(port):
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
