"""A run that is asked to end saves what it has, and goes on from there as if nothing had been."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines import pretrain, storage
from pipelines.config.checks import to_dict
from pipelines.training.checkpoint import complete_steps
from pipelines.training.run_dir import RunDir
from tests.pipelines.pretrain_fixtures import (
    metrics_of,
    per_step,
    small_config,
    weight_bytes,
)

REPOSITORY = Path(__file__).parents[2]
LOG_EVERY, STEPS = 4, 160


def config_for(tables, output, store, workers=0, **sections):
    return small_config(
        tables,
        output,
        log_every=LOG_EVERY,
        optim={"steps": STEPS},
        checkpoint={"every_steps": 10_000},
        scaling={"num_workers": workers},
        tracking={"enabled": True, "uri": store},
        **sections,
    )


def begin(config, tmp_path):
    """The command of this configuration, as its user gives it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(config)))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "pretrain", "--config", str(recipe)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_metrics(output):
    for _ in range(2400):
        if storage.exists(f"{output}/metrics.jsonl") and metrics_of(output):
            return
        time.sleep(0.05)
    raise AssertionError("training has not begun")


def runs(store):
    from mlflow import MlflowClient

    return MlflowClient(store).search_runs(["1"])


def runs_begun(output):
    return storage.read_json(f"{output}/run.json")["mlflow_run_id"]


def check_stopped_and_continued(config, tables, tmp_path):
    output = config.output
    command = begin(config, tmp_path)
    wait_for_metrics(output)
    command.send_signal(signal.SIGTERM)
    _, said = command.communicate(timeout=120)
    assert command.returncode == 130, said
    [run] = runs(config.tracking.uri)
    assert run.info.status == "KILLED"

    # All that was logged is saved: at most the steps of one log are lost, and here none.
    saved = max(complete_steps(RunDir(output).checkpoints))
    assert 0 < saved < STEPS
    assert saved == metrics_of(output)[-1]["step"] + 1
    assert f"saved at step {saved}" in said

    result = pretrain.run(config)
    assert result.resumed_from == saved
    [run] = runs(config.tracking.uri)
    assert run.info.status == "FINISHED"
    assert "beit.error" not in run.data.tags

    undisturbed = str(tmp_path / "undisturbed")
    untracked = dataclasses.replace(config.tracking, enabled=False)
    pretrain.run(dataclasses.replace(config, output=undisturbed, tracking=untracked))
    assert weight_bytes(output) == weight_bytes(undisturbed)
    assert per_step(output) == per_step(undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(tables, tmp_path, mlflow_uri):
    config = config_for(tables, str(tmp_path / "run"), mlflow_uri)
    check_stopped_and_continued(config, tables, tmp_path)


@pytest.mark.ray
@pytest.mark.long
def test_sigterm_reaches_two_workers_at_the_same_step(ray_cluster, tables, tmp_path, mlflow_uri):
    config = config_for(tables, str(tmp_path / "run"), mlflow_uri, workers=2)
    check_stopped_and_continued(config, tables, tmp_path)


def test_a_request_of_an_earlier_start_is_forgotten(tables, tmp_path):
    config = small_config(tables, tmp_path / "run")
    RunDir(config.output).request_end()
    assert pretrain.run(config).steps == config.optim.steps


@pytest.mark.ray
def test_sigterm_before_the_workers_have_begun_ends_the_run(ray_turn, tables, tmp_path, mlflow_uri):
    # More workers than there is place for: Ray Train waits, and the stage with it.
    everywhere = {"global_batch_size": 64, "num_shards": 64, "window": 8}
    config = config_for(tables, str(tmp_path / "run"), mlflow_uri, workers=64, data=everywhere)
    command = begin(config, tmp_path)
    try:
        for _ in range(2400):
            if storage.exists(f"{config.output}/run.json") and runs_begun(config.output):
                break
            time.sleep(0.05)
        time.sleep(5)  # into Ray Train's waiting
        command.send_signal(signal.SIGTERM)
        _, said = command.communicate(timeout=120)
    finally:
        command.kill()
    assert command.returncode == 130, said
    assert [run.info.status for run in runs(config.tracking.uri)] == ["KILLED"]
