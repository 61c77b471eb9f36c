"""The driver of a training run: starts its workers, sees them through, and tells how it ended.

A stage checks its inputs, makes its plan and opens its run directory; from there on `train` does
the same for all of them. Workers and driver meet in the run directory alone: what goes wrong in a
worker is an event there, how far it got is its attempt, and the driver shows and judges those.
"""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipelines import storage, tracking
from pipelines.config.checks import flatten, to_dict
from pipelines.config.common import ScalingConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, LeaseLost, StageFailed
from pipelines.progress import counted
from pipelines.redaction import redacted_text
from pipelines.steps import say_step
from pipelines.tracking.spool import Spool
from pipelines.training.checkpoint import complete_steps
from pipelines.training.distributed import World, join_world
from pipelines.training.log import ProgressThread, TrainLog
from pipelines.training.pulse import DIRECTORY, Pulse, Stalls
from pipelines.training.run_dir import RunDir
from pipelines.training.run_report import GAVE_UP, picture_of_time, run_report
from pipelines.training.stopping import StopRequested, saved_on_sigterm

# Starts from the same checkpoint, none of which reached the next one, before a run gives up.
MAX_FRUITLESS_STARTS = 4
WORKER_FAILED = "worker_failed"
INTERRUPTED = "interrupted"


class TrainConfig(Protocol):
    """What the driver needs of a stage's configuration."""

    @property
    def scaling(self) -> ScalingConfig:
        """On how much it is computed."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where it is recorded."""


class Plan(Protocol):
    """What a stage works out once, for all workers and restarts."""

    @property
    def total_steps(self) -> int:
        """Length of the run."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What report.json repeats of it."""


Config_ = TypeVar("Config_", bound=TrainConfig)
Plan_ = TypeVar("Plan_", bound=Plan)
Loop = Callable[[Config_, Plan_, World, TrainLog], None]
"""One worker's whole training. It returns when the run is done, and raises StageFailed on all
workers (or, after the last step, on worker 0) when the run must not go on. Any other exception
means that this start failed and another may help; InputError, that none will."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of the command, as all its workers know it."""

    stage: str
    run: RunDir
    launched_at: float
    """Seconds since the epoch."""
    tracked: bool
    """Whether MLflow records it."""


def start_tracking(
    config: TrainConfig, run: RunDir, *, stage: str, inputs: Sequence[tracking.Dataset]
) -> tracking.Run:
    """The MLflow run of this run directory, continued or new."""
    tracked = tracking.start_run(
        config.tracking,
        stage=stage,
        params=flatten(to_dict(config)),
        tags={"beit.run_dir": run.uri},
        inputs=inputs,
        resume_run_id=run.record()["mlflow_run_id"],
        spool=run.uri,
        check=run.check,
        system_metrics=False,  # those of worker 0 are recorded
    )
    run.set_run_id(tracked.run_id)
    return tracked


def train(
    loop: Loop[Config_, Plan_],
    config: Config_,
    plan: Plan_,
    run: RunDir,
    tracked: tracking.Run,
    *,
    stage: str,
    launched_at: float,
) -> dict[str, Any]:
    """Runs `loop` on its workers, here or on Ray Train, until it has ended; returns report.json.

    `launched_at` is when the stage was started, in seconds since the epoch.

    Raises:
        InputError: a worker met input that cannot be used.
        StageFailed: the loop stopped the run, or the workers failed too often.
        LeaseLost: another driver has taken the run over.
        KeyboardInterrupt: SIGTERM ended it; what was done is saved.
    """
    launch = Launch(
        stage=stage,
        run=run,
        launched_at=launched_at,
        tracked=bool(tracked.run_id),
    )
    try:
        start_step = newest_step(run)
        with (
            saved_on_sigterm(run, launched_at=launched_at),
            ProgressThread(
                run,
                stage,
                total_steps=plan.total_steps,
                start_step=start_step,
                stalls=Stalls(run, factor=config.scaling.stall_factor),
            ),
        ):
            if config.scaling.worker_range[1] == 0:
                world = join_world(use_gpu=config.scaling.use_gpu, in_ray=False)
                _attempt(loop, config, plan, launch, world)
            else:
                _train_on_ray(loop, config, plan, launch)
    finally:
        report = run_report(run, plan.total_steps, plan.figures, launched_at)
        run.write_report(report)
        if tracked.run_id:
            tracked.log_image("time", picture_of_time(run, report), report["steps"])
        storage.delete_prefix(run.at(DIRECTORY))
        if report["outcome"] != "finished":
            tracked.set_note(redacted_text(_verdict_of_unfinished(report)))
    if not any(attempt.launched_at == launched_at for attempt in run.attempts()):
        raise InputError(
            f"output = {run.uri}: the workers have ended, and nothing that they wrote is there: "
            "nodes see different disks; use a directory that all of them share, or s3://"
        )
    if report["outcome"] == INTERRUPTED:
        raise KeyboardInterrupt(f"Asked to end (SIGTERM): {report['message']}.")
    if report["outcome"] != "finished":
        raise StageFailed(report["message"] or f"the run did not finish; see {run.at('events')}")
    return report


def is_recorded(config: TrainConfig, run: RunDir) -> bool:
    """Whether all that a finished run has to say is recorded where the configuration asks for it.

    If not, its stage goes on with the run and says it again.
    """
    record = Spool(run.uri).record()
    if not record:  # of a version that kept none
        return True
    finished = record["status"] == "FINISHED"
    return finished and (record["complete"] or not config.tracking.enabled)


def _verdict_of_unfinished(report: Mapping[str, Any]) -> str:
    books = report["goodput"]
    return (
        f"**{report['outcome'] or 'not finished'}** after {report['steps']} of "
        f"{report['total_steps']} steps: {report['message'] or 'its workers were lost'}\n\n"
        f"{counted(books['attempts'], 'start')}, {books['wall_seconds']:.0f} s, "
        f"{books['goodput']:.0%} of them productive; most else went into {books['bottleneck']}."
    )


def newest_step(run: RunDir) -> int:
    """Steps that need not be done again."""
    return max(complete_steps(run.checkpoints), default=0)


def _attempt(
    loop: Loop[Config_, Plan_], config: Config_, plan: Plan_, launch: Launch, world: World
) -> None:
    """One worker's part in one start of the group."""
    run, launched_at = launch.run, launch.launched_at
    reason = world.broadcast(hopeless(run, launched_at, world.size) if world.rank == 0 else "")
    if reason:
        if world.rank == 0:
            with contextlib.suppress(LeaseLost):
                run.event(GAVE_UP, message=reason)
        return
    with (
        TrainLog(run, world, launched_at=launched_at, system_metrics=launch.tracked) as log,
        Pulse(run, log.books, rank=world.rank, limit=_limit(config.scaling)),
    ):
        try:
            loop(config, plan, world, log)
        except StageFailed as verdict:
            log.end("stopped", str(verdict))
        except StopRequested as request:
            log.end(INTERRUPTED, str(request))
        else:
            log.end("finished")


def _limit(scaling: ScalingConfig) -> float | None:
    """Seconds after which a worker that stands still ends itself; None where nobody restarts it.

    Those who wait for one that is stopped are ended by their collective, after as long.
    """
    return scaling.stall_seconds if scaling.worker_range[1] > 0 else None


def hopeless(run: RunDir, launched_at: float, workers: int) -> str:
    """Why another start, of so many workers, will not help, or "".

    It will not after bad input, nor in a loop of crashes at one place.
    """
    try:
        run.check()
    except LeaseLost as error:
        return str(error)
    if message := _bad_input(run, launched_at):
        return message
    attempts = [a for a in run.attempts() if a.launched_at == launched_at]
    followers = [*(a.workers for a in attempts), workers][1:]
    # A start that a larger group followed was ended by growing, not by failing.
    starts = [a for a, after in zip(attempts, followers, strict=True) if after <= a.workers]
    last, step = starts[-MAX_FRUITLESS_STARTS:], newest_step(run)
    if len(last) < MAX_FRUITLESS_STARTS or any(a.start_step != step for a in last):
        return ""
    failures = _failures(run, launched_at)
    seen = failures[-1]["message"] if failures else "its processes were killed"
    return (
        f"{len(last)} starts in a row did not get from step {step} to the next checkpoint; "
        f"the last time: {seen}. Events: {run.at('events')}"
    )


def _failures(run: RunDir, launched_at: float) -> list[dict[str, Any]]:
    return [event for event in run.events(WORKER_FAILED) if event["time"] >= launched_at]


def _bad_input(run: RunDir, launched_at: float) -> str:
    return next((str(e["message"]) for e in _failures(run, launched_at) if e["final"]), "")


def _train_on_ray(loop: Loop[Config_, Plan_], config: Config_, plan: Plan_, launch: Launch) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    from pipelines.training.ray_trainer import Trainer

    run, scaling = launch.run, config.scaling
    low, high = scaling.worker_range
    _say_if_too_small(scaling, launch.stage)
    filesystem, path = storage.resolve(run.at("ray"))
    trainer = Trainer(
        _worker,
        train_loop_config={"loop": loop, "config": config, "plan": plan, "launch": launch},
        torch_config=TorchConfig(
            backend="nccl" if scaling.use_gpu and not _claims_gpus() else "gloo",
            timeout_s=round(scaling.stall_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=scaling.use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker,
                **({"GPU": 1} if scaling.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            # A fresh name each time: what Ray remembers of earlier launches is not used, and a
            # half-written record of it cannot stand in the way.
            name=f"launch_{launch.launched_at:.3f}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=scaling.max_failures, max_preemption_failures=scaling.max_preemptions
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    each = f"{scaling.cpus_per_worker} CPU" + (" and 1 GPU" if scaling.use_gpu else "")
    say_step(f"waiting for workers: {low} x {each}")
    failed: TrainingFailedError | None = None
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failed = error
    except SystemExit as end:  # Ray's own way to end on Ctrl-C, with code 0
        raise KeyboardInterrupt("The workers were ended.") from end
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray leaves its own
        storage.delete_prefix(run.at("ray"))
    run.check()
    if message := _bad_input(run, launch.launched_at):
        raise InputError(message) from failed
    if failed is not None:
        last = str(failed).strip().splitlines()[-1]
        if isinstance(failed, ControllerError):
            raise StageFailed(
                f"what Ray Train starts the workers with failed: {last}. The same command goes on "
                f"from the last checkpoint. Events: {run.at('events')}"
            ) from failed
        raise StageFailed(
            f"the workers failed more than scaling.max_failures = {scaling.max_failures} times"
            f", or their nodes were taken away more than scaling.max_preemptions = "
            f"{scaling.max_preemptions} times; the last time: {last}. Events: {run.at('events')}"
        ) from failed


def _worker(job: Mapping[str, Any]) -> None:
    launch: Launch = job["launch"]
    try:
        world = join_world(use_gpu=job["config"].scaling.use_gpu, in_ray=True)
        _attempt(job["loop"], job["config"], job["plan"], launch, world)
    except Exception as error:
        from ray.train import get_context

        rank = get_context().get_world_rank()
        # Bad input stays bad: the next start reads this and gives up.
        final = isinstance(error, InputError)
        launch.run.event(
            WORKER_FAILED,
            rank=rank,
            final=final,
            message=str(error) if final else f"worker {rank}: {type(error).__name__}: {error}",
            traceback=traceback.format_exc()[-4000:],
        )
        raise


def _claims_gpus() -> bool:
    """Whether Ray counts GPUs on this node that its build of torch has no use for.

    NCCL would fail before the worker can say so (`join_world`). Of other nodes, which have a build
    of their own and may be still to come, what was asked for is believed.
    """
    import ray
    import torch

    here = ray.get_runtime_context().get_node_id()
    counted = sum(n["Resources"].get("GPU", 0) for n in ray.nodes() if n["NodeID"] == here)
    return torch.version.cuda is None and counted > 0


def _say_if_too_small(scaling: ScalingConfig, stage: str) -> None:
    import ray

    need = scaling.worker_range[0] * scaling.cpus_per_worker
    have = ray.cluster_resources().get("CPU", 0)
    if need > have:
        print(
            f"{stage}: {need} CPUs are needed (scaling.num_workers x scaling.cpus_per_worker), "
            f"the cluster has {have:.0f}; waiting for more nodes",
            file=sys.stderr,
        )
