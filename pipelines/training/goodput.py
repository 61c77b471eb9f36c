"""Where the time of a training run went: books that sum to wall-clock, MFU, and the bottleneck.

A process books every second to exactly one category. Every start of the worker group is an
`Attempt`; the attempts of a run, and the gaps between them, make its time line.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

CATEGORIES = (
    "startup",
    "compute",
    "data_wait",
    "checkpoint",
    "evaluation",
    "restart",
    "idle",
)

KNOBS = {
    "startup": "a longer run; scaling.compile=false if compilation dominates",
    "compute": "scaling.num_workers (more), scaling.precision=bf16, scaling.compile=true",
    "data_wait": "scaling.cpus_per_worker and data.num_threads, `beit render` and --views, which "
    "decode no image, data.executor=ray_tasks to decode on other nodes, or "
    "`beit prepare --max_side` for smaller images",
    "checkpoint": "checkpoint.every_steps (larger), checkpoint.asynchronous=true",
    "evaluation": "probe.every_steps (larger), probe.max_images (smaller)",
    "restart": "checkpoint.every_steps (smaller repeats less work), steadier nodes",
}

# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}


class Books:
    """Seconds of this process by category; exactly one category is open at any time.

    Nested uses book to the innermost category only, so nothing is counted twice.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._open = "startup"
        self.steps = 0
        """Times that data was waited for: steps that were begun."""
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._paced = dict(self._seconds)

    @property
    def doing(self) -> str:
        """The open category."""
        return self._open

    def switch(self, category: str) -> str:
        """Closes the open category, opens this one, and returns the one that was open."""
        now = self._clock()
        self._seconds[self._open] += now - self._since
        before, self._open, self._since = self._open, category, now
        return before

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Books the time inside to `category`."""
        before = self.switch(category)
        self.steps += category == "data_wait"
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by category so far, the open one included; they sum to the process's time."""
        self.switch(self._open)
        return dict(self._seconds)

    def pace(self) -> tuple[float, float]:
        """Seconds that steps took since the last call, and how many of them went into waiting.

        The first call begins a period.
        """
        before, self._paced = self._paced, self.seconds()
        wait = self._paced["data_wait"] - before["data_wait"]
        return self._paced["compute"] - before["compute"] + wait, wait


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the worker group: what rank 0 wrote down while it lived."""

    number: int
    launched_at: float
    """When the driver of this attempt started, in seconds since the epoch."""
    entered_at: float
    """When the training function was entered."""
    start_step: int
    """Steps done when it started, by its checkpoint."""
    next_step: int
    """Steps done when it last wrote."""
    workers: int
    pids: list[int] = field(default_factory=list)
    """Process of each worker, by rank."""
    host: str = ""
    """Machine of worker 0."""
    device: str = ""
    """What it computes on."""
    peak_tflops: float | None = None
    """Its peak, by which MFU is reckoned; None: not known."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Its books."""
    latest: dict[str, Any] = field(default_factory=dict)
    """What the progress line shows of its last logging period: names and texts."""
    outcome: str = ""
    """finished or stopped; empty while running and after a kill."""
    message: str = ""
    """Why it stopped."""

    @property
    def seconds_of_steps(self) -> float:
        """Its time since starting up."""
        return sum(self.seconds.values()) - self.seconds.get("startup", 0.0)

    @property
    def until(self) -> float:
        """When it last wrote."""
        return self.entered_at + sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The whole run: every second from its first launch to `end` in one category."""

    wall_seconds: float
    seconds: dict[str, float]
    repeated_steps: int
    """Steps done twice because a kill came after the last checkpoint; their time is `restart`."""
    attempts: int
    bottleneck: str
    """The category other than compute with most seconds, or compute if all others are small; never
    idle."""
    knob: str
    """What to change about it."""

    @property
    def share(self) -> float:
        """Productive share of wall-clock: compute that was not repeated."""
        return self.seconds["compute"] / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain values for report.json."""
        return dataclasses.asdict(self) | {"goodput": self.share}


def account(attempts: Sequence[Attempt], end: float) -> Goodput:
    """Lays the attempts of a run on one time line that ends at `end` (seconds since the epoch).

    Between launch and training function lies start-up (for the first attempt) or restart; between
    the last sign of an attempt and the next one's entry lies restart if the same driver lived on;
    between that sign and the next driver's launch nobody ran: idle. The compute of steps that a
    later attempt did again counts as restart.
    """
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    repeated = 0
    cursor = attempts[0].launched_at if attempts else end
    start = cursor
    for index, attempt in enumerate(attempts):
        if attempt.launched_at > cursor:
            seconds["idle"] += attempt.launched_at - cursor
            cursor = attempt.launched_at
        gap = max(0.0, attempt.entered_at - cursor)
        seconds["startup" if index == 0 else "restart"] += gap
        booked = dict(attempt.seconds)
        if index > 0:  # everything before the first new step exists only because of a restart
            booked["restart"] = booked.get("restart", 0.0) + booked.pop("startup", 0.0)
        if index + 1 < len(attempts):
            lost = max(0, attempt.next_step - attempts[index + 1].start_step)
            done = attempt.next_step - attempt.start_step
            lost = min(lost, max(done, 0))
            moved = booked.get("compute", 0.0) * lost / done if done > 0 else 0.0
            booked["compute"] = booked.get("compute", 0.0) - moved
            booked["restart"] = booked.get("restart", 0.0) + moved
            repeated += lost
        for name, value in booked.items():
            seconds[name] += value
        cursor = max(cursor + gap, attempt.until)
    seconds["idle"] += max(0.0, end - cursor)
    wall = sum(seconds.values())
    name = bottleneck(seconds)
    return Goodput(
        wall_seconds=max(wall, end - start),
        seconds=seconds,
        repeated_steps=repeated,
        attempts=len(attempts),
        bottleneck=name,
        knob=KNOBS[name],
    )


def bottleneck(seconds: dict[str, float]) -> str:
    """The category to look at first: the largest beside compute if it takes 5 % or more.

    Not idle, in which nothing ran: nothing about the run would change it.
    """
    total = sum(value for name, value in seconds.items() if name != "idle")
    others = {name: value for name, value in seconds.items() if name not in ("compute", "idle")}
    worst = max(others, key=lambda name: others[name])
    return worst if total > 0 and others[worst] / total >= 0.05 else "compute"


def model_flops_utilisation(
    images_per_second: float, flops: float, workers: int, peak_tflops: float | None
) -> dict[str, float]:
    """{"mfu": images/s x FLOPs per image / (workers x peak of one worker's device)}.

    Empty where the peak is not known: one that was measured here would make a figure above 1.
    """
    if peak_tflops is None:
        return {}
    return {"mfu": images_per_second * flops / (workers * peak_tflops * 1e12)}


def device_peak(device: torch.device, given: float | None = None) -> float | None:
    """Peak of the device in TFLOP/s: as it is given, or from data sheets, or None."""
    if given is not None or device.type != "cuda":
        return given
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(device_name: str) -> float | None:
    """Data-sheet peak of a GPU by (part of) its name, in TFLOP/s; None if it is not listed."""
    for name, peak in PEAK_TFLOPS.items():
        if all(part in device_name for part in name.split()):
            return peak
    return None
