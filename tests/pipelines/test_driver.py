"""The driver of every training run, with loops of three lines and without Ray."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from pipelines import tracking
from pipelines.errors import InputError, StageFailed
from pipelines.training import driver
from pipelines.training.goodput import Attempt
from pipelines.training.ray_trainer import Trainer
from pipelines.training.run_dir import RunDir

LAUNCHED_AT = 1000.0


@dataclass
class Scaling:
    worker_range: tuple = (0, 0)
    use_gpu: bool = False
    cpus_per_worker: int = 1
    stall_factor: float = 20.0
    stall_seconds: float = 300.0
    max_failures: int = 8
    max_preemptions: int = 100


@dataclass
class Config:
    seed: int = 0
    scaling: Scaling = field(default_factory=Scaling)


@dataclass
class Plan:
    total_steps: int = 3
    figures: dict = field(default_factory=lambda: {"floor": 0.5})


@pytest.fixture
def run(tmp_path):
    run = RunDir(str(tmp_path / "run"))
    run.begin(Config(), {"images": "a"}, may_change=("scaling",))
    return run


def train(loop, run):
    return driver.train(
        loop,
        Config(),
        Plan(),
        run,
        tracking.Run(),
        stage="test",
        launched_at=LAUNCHED_AT,
    )


def three_steps(config, plan, world, log):
    for step in range(log.start(None), plan.total_steps):
        log.period(step, {"loss": 3.0 - step}, {"loss": f"{3 - step}"})


def report_of(run):
    report = json.loads(Path(run.at("report.json")).read_text())
    assert report.pop("_sealed")
    assert report.pop("seal")
    return report


def test_a_run_to_its_end(run, capsys):
    report = train(three_steps, run)
    assert report == report_of(run)
    assert (report["outcome"], report["steps"], report["total_steps"]) == ("finished", 3, 3)
    assert report["last_period"] == {"step": 2, "loss": 1.0}
    assert report["floor"] == 0.5
    shown = capsys.readouterr().err
    assert "test: 100% 3/3" in shown
    assert "loss 1" in shown


def test_a_verdict_of_the_loop_stops_the_run(run):
    def loop(config, plan, world, log):
        log.start(None)
        log.period(0, {}, {})
        raise StageFailed("collapsed at step 1")

    with pytest.raises(StageFailed, match="collapsed at step 1"):
        train(loop, run)
    report = report_of(run)
    assert (report["outcome"], report["message"], report["steps"]) == (
        "stopped",
        "collapsed at step 1",
        1,
    )


@pytest.mark.parametrize("error", [InputError("images = 'x': damaged"), KeyError("gone")])
def test_other_failures_come_out_as_they_are(run, error):
    def loop(config, plan, world, log):
        raise error

    with pytest.raises(type(error), match=str(error)):
        train(loop, run)
    assert report_of(run)["outcome"] == ""
    assert len(run.attempts()) == 1  # also a start that dies at once is one


def test_an_earlier_end_does_not_vouch_for_a_later_start(run):
    train(three_steps, run)

    def loop(config, plan, world, log):
        raise KeyError

    with pytest.raises(KeyError):
        driver.train(loop, Config(), Plan(), run, tracking.Run(), stage="t", launched_at=2e9)
    assert report_of(run)["outcome"] == ""


def test_workers_that_write_elsewhere_are_found_out(run, monkeypatch):
    monkeypatch.setattr(driver, "_attempt", lambda *_: None)
    with pytest.raises(InputError, match=f"output = {run.uri}: .* nodes see different disks"):
        train(three_steps, run)


def starts(run, *workers):
    """Starts of groups of this size, none of which got anywhere."""
    for number, count in enumerate(workers, 1):
        attempt = Attempt(
            number=number,
            launched_at=LAUNCHED_AT,
            entered_at=LAUNCHED_AT + number,
            start_step=0,
            next_step=0,
            workers=count,
        )
        run.write_attempt(attempt)


def test_growing_is_no_failure_and_dying_is(run):
    starts(run, 1, 2, 3, 4)
    assert driver.hopeless(run, LAUNCHED_AT, workers=5) == ""
    starts(run, 2, 2, 2, 2)
    assert "4 starts in a row" in driver.hopeless(run, LAUNCHED_AT, workers=2)
    assert driver.hopeless(run, LAUNCHED_AT + 1, workers=2) == ""


def test_a_loop_of_crashes_ends_the_run_before_its_next_start(run):
    starts(run, 1, 1, 1, 1)
    run.event(driver.WORKER_FAILED, rank=0, final=False, message="worker 0: OSError: no luck")

    def never(config, plan, world, log):
        pytest.fail("started once more")

    with pytest.raises(StageFailed, match=r"4 starts in a row .* from step 0 .* no luck"):
        train(never, run)
    assert report_of(run)["events"] == {"worker_failed": 1, "gave_up": 1}
    assert len(run.attempts()) == 4


def test_bad_input_of_a_worker_ends_the_run_at_its_next_start(run):
    assert driver.hopeless(run, LAUNCHED_AT, workers=1) == ""
    run.event(driver.WORKER_FAILED, rank=1, final=True, message="images = 'x': damaged")
    assert driver.hopeless(run, LAUNCHED_AT, workers=1) == "images = 'x': damaged"
    # The command started again tries again: the input may have been mended.
    assert driver.hopeless(run, 2e9, workers=1) == ""


@pytest.mark.parametrize(
    ("cuda", "counted_here", "claims"), [("13.0", 1, False), (None, 1, True), (None, 0, False)]
)
def test_gpus_of_other_nodes_are_believed(monkeypatch, cuda, counted_here, claims):
    """Workers meet by NCCL also where the driver's node has no GPU and an image without CUDA."""
    nodes = [
        {"NodeID": "head", "Resources": {"GPU": counted_here}},
        {"NodeID": "worker", "Resources": {"GPU": 8}},
    ]
    head = SimpleNamespace(get_node_id=lambda: "head")
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: head)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert driver._claims_gpus() is claims


def test_what_takes_a_living_controller_for_dead_is_left_out():
    named = [
        {type(one).__name__ for one in kind(lambda: None)._create_default_callbacks()}
        for kind in (TorchTrainer, Trainer)
    ]
    assert named[0] - named[1] == {"PlacementGroupCleanerCallback"}
    assert named[1] < named[0]


def test_a_controller_that_fails_is_called_so(run, monkeypatch):
    def fit(_):
        raise ControllerError(RuntimeError("first line\nits placement group was removed"))

    monkeypatch.setattr(Trainer, "fit", fit)
    launch = driver.Launch(stage="test", run=run, launched_at=LAUNCHED_AT, tracked=False)
    config = Config(scaling=Scaling(worker_range=(2, 2)))
    monkeypatch.setattr(driver, "_say_if_too_small", lambda *_: None)
    with pytest.raises(StageFailed, match=r"starts the workers with failed: its placement group"):
        driver._train_on_ray(three_steps, config, Plan(), launch)
