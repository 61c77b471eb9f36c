"""A training that leaves weights, `pretrain` or `finetune`: its plan, its driver, its result."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines import lease
from pipelines.config.finetune import FinetuneConfig
from pipelines.config.pretrain import OptimConfig, PretrainConfig
from pipelines.errors import InputError
from pipelines.tables.weights_store import weights_fingerprint
from pipelines.tracking import Dataset
from pipelines.training import driver
from pipelines.training.data import AnyConfig, largest_divisor
from pipelines.training.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What the driver works out once for all workers and restarts."""

    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    flops_per_image: float
    fingerprints: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, float]:
        """What report.json repeats."""
        return {"flops_per_image": self.flops_per_image}


def schedule_lengths(optim: OptimConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the whole run, and of its warm-up.

    Raises:
        InputError: the warm-up is as long as the run.
    """
    total = optim.total_steps(steps_per_epoch)
    warmup = optim.total_warmup_steps(steps_per_epoch)
    if warmup >= total:
        raise InputError(
            f"optim.warmup_steps / warmup_epochs = {warmup} steps, but the run has {total}: "
            "shorten the warm-up (--optim.warmup_steps) or lengthen the run"
        )
    return total, warmup


def check_workers(config: PretrainConfig | FinetuneConfig) -> None:
    """A fixed number of workers must divide the canonical shards.

    Raises:
        InputError: it does not.
    """
    low, high = config.scaling.worker_range
    if low == high > 0 and config.data.num_shards % high:
        raise InputError(
            f"scaling.num_workers = {high} does not divide data.num_shards = "
            f"{config.data.num_shards}: choose "
            f"{largest_divisor(config.data.num_shards, high)} workers, or start a new "
            "run with another data.num_shards"
        )


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run has to say."""

    run: RunDir
    resumed_from: int
    """Steps that were done before this call; equal to `steps` if there was nothing left to do."""
    report: Mapping[str, Any]
    """report.json."""

    @property
    def run_uri(self) -> str:
        """Its directory."""
        return self.run.uri

    @property
    def weights_uri(self) -> str:
        """What it has left."""
        return self.run.weights

    @property
    def mlflow_run_id(self) -> str:
        """Empty where it was not recorded."""
        return str(self.run.record()["mlflow_run_id"])

    @property
    def steps(self) -> int:
        """Length of the run."""
        return int(self.report["steps"])

    @property
    def loss(self) -> float:
        """Of the last logging period."""
        return self.figure("loss")

    def figure(self, name: str) -> float:
        """A figure of the last logging period; NaN where it is missing or was not finite."""
        value = self.report["last_period"].get(name)
        return math.nan if value is None else float(value)

    @property
    def already_done(self) -> bool:
        """There was nothing left to do."""
        return self.resumed_from == self.steps

    def told(self, figures: str) -> str:
        """One line for a person, with the figures of its stage."""
        done = "were done already" if self.already_done else "done"
        return (
            f"{self.steps} steps {done}; loss {self.loss:.3f}, {figures}; look first at "
            f"{self.report['goodput']['bottleneck']}; run: {self.run_uri}"
        )

    def summary(self) -> str:
        """One line for a person."""
        raise NotImplementedError


Plan_ = TypeVar("Plan_", bound=TrainPlan)
Result_ = TypeVar("Result_", bound=TrainResult)


def train_to_weights(
    loop: driver.Loop[AnyConfig, Plan_],
    config: AnyConfig,
    plan: Plan_,
    result_of: Callable[..., Result_],
    *,
    uri: str,
    inputs: Sequence[Dataset],
    stage: str,
    may_change: Sequence[str],
    launched_at: float,
    start_ray: Callable[[], None],
) -> Result_:
    """Trains in the run directory `uri` to the end, continuing what it holds.

    `result_of` takes the fields of `TrainResult`; for the rest see `driver.train`.

    Raises:
        InputError: the directory holds another run.
        StageFailed: a health check stopped the run, or the workers failed too often.
    """
    # The run directory: new, this run's, or another's; then ours alone.
    run_dir = RunDir(uri)
    run_dir.holds(config, plan.fingerprints, may_change=may_change)
    done = run_dir.finished_report(plan.total_steps)
    if done is not None and driver.is_recorded(config, run_dir):
        lease.clear(run_dir.uri, config.lease, stage=stage)
        return result_of(run=run_dir, report=done, resumed_from=plan.total_steps)
    start_ray()
    with lease.held(run_dir.uri, config.lease, stage=stage) as holder:
        run_dir = RunDir(run_dir.uri, holder.fence)
        run_dir.begin(config, plan.fingerprints, may_change=may_change)
        # Who had the lease before may have finished the run.
        done = run_dir.finished_report(plan.total_steps)
        before = driver.newest_step(run_dir) if done is None else plan.total_steps
        if done is None or not driver.is_recorded(config, run_dir):
            with driver.start_tracking(config, run_dir, stage=stage, inputs=inputs) as tracked:
                # A run that was done before it was recorded is recorded now.
                done = done or driver.train(
                    loop, config, plan, run_dir, tracked, stage=stage, launched_at=launched_at
                )
                result = result_of(run=run_dir, report=done, resumed_from=before)
                tracked.set_note(result.summary())
                identity = weights_fingerprint(run_dir.weights)
                tracked.set_output(Dataset(name="weights", uri=run_dir.weights, digest=identity))
                tracked.log_weights(
                    run_dir.weights, registered_model_name=config.tracking.registered_model
                )
        holder.done()
    return result_of(run=run_dir, report=done, resumed_from=before)
