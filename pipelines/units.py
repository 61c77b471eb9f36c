"""The runner of units: what `prepare`, `tokenize`, `render` and `evaluate` share.

A stage cuts its work into units. Each becomes files whose names and bytes follow from the unit
alone, so that doing it twice, here or by a second driver, does no harm. The driver gives units
that have no receipt to Ray Data, some thousands in a round; workers answer with an `Outcome`; and
`Attempts` counts the deaths of processes, so that no unit is tried for ever.

Words: a *receipt* is the durable note that a unit is done, an *outcome* the message that says what
became of it, an *attempt* a piece of work that began; one that never ended took its process along.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.errors import InputError, StageFailed
from pipelines.steps import said_if_slow

WORK = "_work"
# Units given to Ray Data at once: it keeps an object in the driver's memory for each.
UNITS_PER_ROUND = 16384
# Seconds between two signs of life before the first outcome of a round.
WAITING_EVERY = 10.0
KEPT = "Finished units are kept; when this is mended, the same command goes on from here."
"""What people are told of a stage that failed, unless the stage has other words."""


def work_uri(output: str, *parts: str) -> str:
    """Address of a working file of an unfinished table."""
    return storage.join(output, WORK, *parts)


# Messages


@dataclass(kw_only=True)
class Outcome:
    """What became of a unit: the message of its worker to the driver."""

    unit: int
    facts: dict[str, Any] = field(default_factory=dict)
    """Of a unit that is done: what the stage books."""
    rejected: str = ""
    """Why the unit can never be done."""
    suspect: str = ""
    """Why the unit is set aside for now: its process died, or the work ended in an error."""
    input_error: str = ""
    failed: str = ""
    """What ends the job: bad input, or anything else that a person can mend."""
    made: bytes | None = None
    """What a unit came to, where no file of its own holds it."""

    @classmethod
    def of_error(cls, unit: int, name: str, error: Exception) -> "Outcome":
        """The end of the job. It travels as a message, without the frames of Ray."""
        if isinstance(error, InputError):
            return cls(unit=unit, input_error=f"unit {name}: {error}")
        if isinstance(error, StageFailed):
            return cls(unit=unit, failed=str(error))
        return cls(unit=unit, failed=f"unit {name}: {type(error).__name__}: {error}")

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        return cls(**json.loads(text))

    def check(self, advice: str = KEPT) -> "Outcome":
        """Returns itself; `advice` ends the message of a failure.

        Raises:
            InputError, StageFailed: this ends the job.
        """
        if self.input_error:
            raise InputError(self.input_error)
        if self.failed:
            raise StageFailed(f"{self.failed}\n{advice}")
        return self


def outcome_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """Outcomes as the last stage of a round returns them."""
    said, made = [], []
    for outcome in outcomes:
        made.append(outcome.made)
        said.append(json.dumps(asdict(replace(outcome, made=None))))
    return pa.table({"outcome": said, "made": pa.array(made, pa.large_binary())})


# Rounds


def rounds(units: Iterable[dict[str, Any]]) -> Iterator[ray.data.Dataset]:
    """Datasets of one column `unit` (JSON, a block each), to be mapped to `outcome_table`s."""
    rest = iter(units)
    while rows := [{"unit": json.dumps(unit)} for unit in islice(rest, UNITS_PER_ROUND)]:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        # What is derived of this dataset has its settings; nothing else in the process does.
        settings = dataset.context
        settings.enable_progress_bars = settings.print_on_execution_start = False
        # Half an hour by default: nodes may come later, and a unit may take longer.
        settings.execution_no_progress_timeout_s = -1
        yield dataset


def outcomes(mapped: ray.data.Dataset, advice: str = KEPT) -> Iterator[Outcome]:
    """Runs a round; outcomes come as units end.

    Raises:
        InputError, StageFailed: a worker says that the job cannot go on.
    """
    with _quiet_ray_data(), ExitStack() as waiting:
        waiting.enter_context(said_if_slow("the first unit", WAITING_EVERY))
        batches = mapped.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in batches:
            waiting.close()
            for text, made in zip(batch["outcome"].to_pylist(), batch["made"], strict=True):
                outcome = Outcome.from_json(text).check(advice)
                yield replace(outcome, made=made.as_py())


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """There is one progress line, ours."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# Attempts


class Attempts:
    """Actor beside the driver: which work began and has not ended."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}

    def begin(self, work: str) -> int:
        """Notes a beginning; returns how many earlier ones saw no end."""
        deaths = self.open.get(work, 0)
        self.open[work] = deaths + 1
        return deaths

    def end(self, work: str) -> None:
        self.open.pop(work, None)


@contextmanager
def counted_attempts() -> Iterator[ActorHandle]:
    """Starts `Attempts` on the driver's node: it must not die with the workers it watches."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle: ActorHandle = (
        ray.remote(Attempts)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here)
        .remote()
    )
    try:
        yield handle
    finally:
        ray.kill(handle)


@contextmanager
def attempt(attempts: ActorHandle | None, work: str) -> Iterator[int]:
    """In a worker, around work that may end its process; yields how often it has done so."""
    deaths = 0
    if attempts is not None:
        # Without the count a unit is tried more often than it should; nothing else.
        with suppress(ray.exceptions.RayError, TimeoutError):
            deaths = ray.get(attempts.begin.remote(work), timeout=60)
    try:
        yield deaths
    finally:
        if attempts is not None:
            attempts.end.remote(work)  # does not wait
