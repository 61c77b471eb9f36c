"""Real deaths: a worker, the driver, by SIGKILL; then the same result bit for bit.

Each test trains the small recipe on Ray Train and compares with an undisturbed run.
"""

import contextlib
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from beit.schedules import warmup_cosine
from pipelines import pretrain, storage
from pipelines.training import update
from pipelines.training.run_dir import RunDir
from tests.pipelines.pretrain_fixtures import (
    events_of,
    per_step,
    small_config,
    weight_bytes,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
# Long enough that a kill hits the middle; the order of samples repeats after 6 steps.
STEPS = 60
WAIT = 240.0


def config_for(tables, output, workers=2, **sections):
    return small_config(
        tables,
        output,
        optim={"steps": STEPS, "warmup_steps": 2},
        scaling={"num_workers": workers, "peak_tflops": 0.05, **sections.pop("scaling", {})},
        **sections,
    )


@pytest.fixture(scope="module")
def undisturbed(tables, tmp_path_factory, ray_cluster):
    """Two workers from start to end."""
    return pretrain.run(config_for(tables, tmp_path_factory.mktemp("undisturbed") / "run"))


def wait_for_step(run_uri, step):
    """Until the run has logged that many steps."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        try:
            if max(per_step(run_uri), default=-1) >= step:
                return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.02)
    raise TimeoutError(f"step {step} of {run_uri}")


class TestWorker:
    def test_a_killed_worker_costs_time_and_nothing_else(self, tables, tmp_path, undisturbed):
        output = str(tmp_path / "run")
        victim, step = random.SystemRandom().randrange(2), random.SystemRandom().randrange(13, 40)
        killed = []

        def kill():
            wait_for_step(output, step)
            killed.append(RunDir(output).attempts()[-1].pids[victim])
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        result = pretrain.run(config_for(tables, output))
        thread.join()
        what = f"worker {victim} killed after step {step}"
        assert killed, what
        assert result.report["goodput"]["attempts"] == 2, what
        assert weight_bytes(output) == weight_bytes(undisturbed.run_uri), what
        assert per_step(output) == per_step(undisturbed.run_uri), what
        seconds = result.report["goodput"]["seconds"]
        assert seconds["restart"] > 0
        assert sum(seconds.values()) == pytest.approx(result.report["goodput"]["wall_seconds"])
        resumed = [event for event in events_of(output) if event["event"] == "resumed"]
        assert len(resumed) == 1, what
        # At most the checkpoint that was being written is lost.
        assert resumed[0]["step"] >= step - 8, what

    @pytest.mark.long
    def test_a_stopped_worker_is_named_and_the_group_restarted(self, tables, tmp_path, undisturbed):
        output = str(tmp_path / "run")
        stopped = []

        def stop():
            wait_for_step(output, 20)
            time.sleep(5)  # its pulse is heard, if the run is not over by then
            stopped.append(RunDir(output).attempts()[-1].pids[1])
            os.kill(stopped[0], signal.SIGSTOP)

        thread = threading.Thread(target=stop)
        thread.start()
        config = config_for(tables, output, scaling={"stall_seconds": 40.0})
        config = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, steps=400), log_every=20
        )
        result = pretrain.run(config)
        thread.join()
        assert result.report["goodput"]["attempts"] == 2
        told = [event["message"] for event in events_of(output) if event["event"] == "stalled"]
        assert any(f"(process {stopped[0]}) shows no sign of life" in text for text in told)
        # The samples of the steps that both did are the same ones.
        steps = per_step(output)
        assert len(steps) == 400
        assert all(
            steps[step][1] == samples
            for step, (_, samples) in per_step(undisturbed.run_uri).items()
        )


DRIVER = """
import os, sys
sys.path.insert(0, {repository!r})
import tests.conftest
import ray
ray.init(address="local", num_cpus=4, object_store_memory=200_000_000,
         include_dashboard=False, log_to_driver=False, logging_level="ERROR")
from pipelines import pretrain
from tests.pipelines.test_resume import config_for
pretrain.run(config_for({tables!r}, {output!r}))
"""


@pytest.mark.long
class TestDriver:
    def test_a_killed_driver_is_started_again_by_the_same_command(
        self, tables, tmp_path, undisturbed
    ):
        output = str(tmp_path / "run")
        script = DRIVER.format(repository=str(REPOSITORY), tables=tables, output=output)
        driver = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
        )
        below = []
        try:
            wait_for_step(output, 0)
            below = psutil.Process(driver.pid).children(recursive=True)
            wait_for_step(output, 12)
        finally:
            driver.kill()
            # Its Ray dies with it, but only when it notices; these steps take milliseconds.
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            driver.wait()
            psutil.wait_procs(below, timeout=10)
        assert not storage.exists(storage.join(output, "report.json"))
        result = pretrain.run(config_for(tables, output))
        assert 8 <= result.resumed_from < STEPS
        assert weight_bytes(output) == weight_bytes(undisturbed.run_uri)
        assert per_step(output) == per_step(undisturbed.run_uri)
        assert result.report["goodput"]["seconds"]["idle"] > 0


class TestWorkerCount:
    @pytest.mark.long
    def test_two_then_one_then_two_workers_see_the_same_samples(
        self, tables, tmp_path, undisturbed, monkeypatch
    ):
        """The loss differs by the order of float32 sums only. The one worker is this process."""
        output = str(tmp_path / "run")
        for workers, until in ((2, 20), (0, 40), (2, STEPS)):
            config = config_for(tables, output, workers)
            if until < STEPS:
                run_until(config, until)
            else:
                result = pretrain.run(config)
        workers = [attempt.workers for attempt in RunDir(output).attempts()]
        assert workers == [2, 1, 2]
        expected, found = per_step(undisturbed.run_uri), per_step(output)
        assert {k: v[1] for k, v in found.items()} == {k: v[1] for k, v in expected.items()}
        assert [found[k][0] for k in sorted(found)] == pytest.approx(
            [expected[k][0] for k in sorted(expected)], abs=2e-3
        )
        assert result.steps == STEPS

    @pytest.mark.parametrize(
        "scaling",
        [
            pytest.param({"num_workers": 2, "strategy": "fsdp"}, id="sharded"),
            pytest.param({"num_workers": (1, 3)}, id="one-idle", marks=pytest.mark.long),
            pytest.param({"num_workers": 0}, id="without-ray"),
        ],
    )
    def test_any_division_of_the_batch_gives_the_same_losses(
        self, tables, tmp_path, undisturbed, scaling
    ):
        output = str(tmp_path / "run")
        run_until(config_for(tables, output, scaling=scaling), 8)
        expected, found = per_step(undisturbed.run_uri), per_step(output)
        assert sorted(found) == list(range(8))
        for step, (loss, samples) in found.items():
            assert samples == expected[step][1]
            assert loss == pytest.approx(expected[step][0], abs=5e-5)


TRAIN_LOOP = pretrain.train_loop


def stop_at(step, config, plan, world, log):
    """`train_loop` that sees a shorter run; the schedule is still that of the whole one."""
    total = plan.total_steps

    def schedule(at, **values):
        return warmup_cosine(at, **{**values, "total_steps": total})

    update.warmup_cosine = schedule
    try:
        TRAIN_LOOP(config, dataclasses.replace(plan, total_steps=step), world, log)
    finally:
        update.warmup_cosine = warmup_cosine


def run_until(config, step):
    """Trains to `step` of the configured run."""
    # The last checkpoint of the short run is one of the whole run; its weights are not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train_loop", functools.partial(stop_at, step))
        pretrain.run(config)
    storage.delete(storage.join(config.output, "report.json"))
    storage.delete_prefix(storage.join(config.output, "weights"))
