"""What a training run tells while it runs: metrics, events, time books, progress.

Worker 0 writes; the others hold a `TrainLog` that writes nothing.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from PIL import Image

from pipelines import storage
from pipelines.errors import InputError, LeaseLost
from pipelines.progress import Progress, counted
from pipelines.redaction import redacted_text
from pipelines.steps import say_step
from pipelines.tracking.spool import LinesFile, Spool
from pipelines.tracking.system_metrics import SystemMetrics
from pipelines.training import stopping
from pipelines.training.checkpoint import complete_steps
from pipelines.training.distributed import World
from pipelines.training.goodput import Attempt, Books, device_peak
from pipelines.training.health import Finding
from pipelines.training.pulse import Stalls
from pipelines.training.run_dir import RunDir

log = logging.getLogger(__name__)

MEASURED = "measured"


class TrainLog:
    """What worker 0 writes down of one start of the worker group; the others write nothing.

    Every start counts, also one that dies before its first step: `pipelines.training.driver` opens
    the log before the loop is entered, and says at its end how it went.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        *,
        launched_at: float,
        system_metrics: bool = False,
    ) -> None:
        self.run, self.books, self.spool = run, Books(), Spool(run.uri, run.check)
        self.active, self.device = world.rank == 0, world.device
        entered_at = time.time()
        pids = world.gather(torch.tensor([os.getpid()], device=world.device))
        # A worker of a later launch counts its attempt after those that are on record.
        number = 1 + max((a.number for a in run.attempts()), default=0) if self.active else 0
        newest = max(complete_steps(run.checkpoints), default=0) if self.active else 0
        self.attempt = Attempt(
            number=number,
            launched_at=launched_at,
            entered_at=entered_at,
            start_step=newest,
            next_step=newest,
            workers=world.size,
            pids=[int(pid) for pid in pids],
            host=socket.gethostname(),
            device=device_name(world.device),
        )
        self.pause = 1.0 if storage.is_local(run.uri) else 20.0
        self.written = -math.inf
        self.leaving = False
        self.metrics: LinesFile | None = None
        self.system: SystemMetrics | None = None
        if self.active:
            self._write_attempt()
            if system_metrics:
                self.system = SystemMetrics(LinesFile(run.at("system.jsonl"), check=run.check))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self.system:
            self.system.close()

    def peak(self, given: float | None) -> float | None:
        """Peak of this worker's device in TFLOP/s, which is written down; None: not known."""
        found = device_peak(self.device, given)
        self.attempt = dataclasses.replace(self.attempt, peak_tflops=found)
        return found

    def start(self, step: int | None) -> int:
        """Begins after the `step` steps of a checkpoint, or with step 0 if there is none."""
        begin = step or 0
        self.attempt = dataclasses.replace(self.attempt, start_step=begin)
        self.rewind(begin)
        if self.active:
            self._write_attempt()
        if step is not None:
            workers = self.attempt.workers
            self.event("resumed", step=step, workers=workers, message=f"continues at step {step}")
        return begin

    def end_requested(self, world: World) -> bool:
        """Whether the run was asked to end: the same answer on all workers."""
        requested = False
        if self.active:
            with tolerated():
                requested = self.run.end_requested()
        return bool(world.broadcast(requested))

    def node_leaving(self, world: World, step: int) -> bool:
        """Whether a node of the workers will be taken away (a spot notice, a drain): then what is
        done is saved at once, for Ray starts a new group when it goes.

        The same answer on all workers, and all must ask: Ray makes a barrier of it.
        """
        notice = stopping.preemption_notice() if world.in_ray else ""
        if notice and not self.leaving:
            self.event("preemption_notice", step=step, message=f"{notice}; saving at step {step}")
        self.leaving = bool(notice)
        return self.leaving

    def rewind(self, step: int) -> None:
        """Drops metrics of steps that will be done again."""
        self.attempt = dataclasses.replace(self.attempt, next_step=step)
        if self.active:
            self.metrics = LinesFile(
                self.run.at("metrics.jsonl"), start_step=step, check=self.run.check
            )

    def period(
        self,
        step: int,
        record: Mapping[str, Any],
        shown: Mapping[str, str],
    ) -> None:
        """A logging period that ends with `step`.

        `record` goes to metrics.jsonl, and its numbers from there to MLflow; `shown` to the
        progress line.
        """
        self.attempt = dataclasses.replace(self.attempt, next_step=step + 1, latest=dict(shown))
        if not self.active:
            return
        assert self.metrics
        with tolerated():
            self.metrics.append(clean({"step": step, **record}))
        if time.monotonic() - self.written >= self.pause:
            with tolerated():
                self._write_attempt()

    def event(self, kind: str, **fields: Any) -> None:
        """Something that a person should be able to find out later."""
        if not self.active:
            return
        with tolerated():
            self.run.event(kind, **clean(fields))

    def checkpoint_rejected(self, step: int, reason: str) -> None:
        """A checkpoint was passed over when one to continue from was looked for."""
        self.event("checkpoint_rejected", at_step=step, message=reason)

    def checkpoint_failed(self, step: int, reason: str) -> None:
        """A checkpoint could not be saved; training goes on."""
        self.event("checkpoint_failed", at_step=step, message=reason)

    def finding(self, finding: Finding) -> None:
        """A health finding."""
        values = dataclasses.asdict(finding)
        self.event(values.pop("kind"), **values)

    def tracked(self, metrics: Mapping[str, float], step: int) -> None:
        """Values that were measured beside the logging periods."""
        self.event(MEASURED, step=step, figures=dict(metrics))

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """A picture."""
        if self.active:
            with tolerated():
                self.spool.picture(key, image, step)

    def flush(self) -> None:
        """Makes metrics durable; done with every checkpoint."""
        if self.metrics:
            with tolerated():
                self.metrics.flush()

    def end(self, outcome: str, message: str = "") -> None:
        """Writes down how this start ended: finished or stopped, and why."""
        self.attempt = dataclasses.replace(self.attempt, outcome=outcome, message=message)
        if self.active:
            self._write_attempt()

    def _write_attempt(self) -> None:
        self.attempt = dataclasses.replace(self.attempt, seconds=self.books.seconds())
        self.run.write_attempt(self.attempt)
        self.written = time.monotonic()


def device_name(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
    """Lets training go on while the store of the run directory is away; the next write tells all.

    What a resume depends on (checkpoints, skips, the outcome) is not written under this.
    """
    try:
        yield
    except OSError as error:
        log.warning("the run directory cannot be written now: %s", redacted_text(str(error)))


def clean(values: Any) -> Any:
    """JSON values: numbers that are not finite become null."""
    if isinstance(values, Mapping):
        return {name: clean(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [clean(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


WAITING_EVERY = 10.0
"""Seconds between two signs of life before the first step; later they are further apart."""


class ProgressThread:
    """Shows on the driver what worker 0 writes into the run directory while training blocks.

    Reading files takes no process of its own, as an actor would, and works wherever the run
    directory does.
    """

    def __init__(
        self,
        run: RunDir,
        label: str,
        *,
        total_steps: int,
        start_step: int,
        stalls: Stalls | None = None,
    ) -> None:
        self.run, self.stalls = run, stalls
        self.every = 0.5 if storage.is_local(run.uri) else 20.0
        self.seen = {event["time"] for event in run.events()}
        self.attempts = len(run.attempts())
        self.started, self.counted = 0, (0, 0)
        self.began = self.said = time.monotonic()
        self.progress = Progress(total_steps, label, "step", initial=start_step)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(timeout=30)
        self.progress.close()

    def _work(self) -> None:
        while not self.stop.wait(self.every):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            if self.stalls:
                self.stalls.look()
            events = [event for event in self.run.events() if event["time"] not in self.seen]
            attempts = self.run.attempts()[self.attempts :]
        except (OSError, InputError) as error:  # storage is away: training itself may still go on
            log.warning("progress cannot be read: %s", redacted_text(str(error)))
            return
        except LeaseLost:  # the workers find it, too
            return
        for event in events:
            self.seen.add(event["time"])
            if event["event"] == MEASURED:
                continue
            text = event.get("message") or json.dumps(event)
            self.progress.stream.write(f"\n{event['event']}: {redacted_text(text)}\n")
        for attempt in attempts[self.started :]:
            workers = counted(attempt.workers, "worker")
            say_step(f"{workers} started, from step {attempt.start_step}; reading first batches")
        self.started = len(attempts)
        if attempts and attempts[-1].latest:
            last = attempts[-1]
            if (last.number, last.next_step) != self.counted:
                self.counted = last.number, last.next_step
                self.progress.counted_from(last.start_step, last.seconds_of_steps)
            self.progress.update(last.next_step, **last.latest)
        else:
            self._say_waiting()

    def _say_waiting(self) -> None:
        """Workers take half a minute to start on a small machine, and hours where nodes lack."""
        now = time.monotonic()
        if now - self.said >= (WAITING_EVERY if now - self.began < 60 else 6 * WAITING_EVERY):
            self.said = now
            what = "the first step" if self.started else "workers"
            say_step(f"still waiting for {what} after {now - self.began:.0f} s")
