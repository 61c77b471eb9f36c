"""Units in a pool of workers: what `tokenize`, `render` and `evaluate` share.

Units go to a pool; one that killed its process or ended in an error there is set aside, and tried
alone after all others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
import ray.data
from ray.actor import ActorHandle

from pipelines.errors import StageFailed
from pipelines.steps import say_step
from pipelines.units import KEPT, Outcome, attempt, counted_attempts

# A process is shared (an actor is at two units, a node has several), so two deaths are a
# suspicion; deaths of a process that held nothing else are proof.
DEATHS_IN_POOL = 2
DEATHS_ALONE = 3
# Units set aside one after the other that end the stage; more where the pool may be large.
ASIDE_IN_A_ROW = 16
# An actor is at two units, and the next two lie ready. Ray Data adds actors when those it has are
# given 1.75 units for each that they work on at a time; fewer, and no pool grows.
UNITS_AT_WORK = 2
UNITS_PER_ACTOR = 4


class AnyUnit(Protocol):
    """A unit as it travels to a worker."""

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...


Unit = TypeVar("Unit", bound=AnyUnit)


def outcomes_of(
    todo: Sequence[int] | np.ndarray,
    unit_of: Callable[[int], Unit],
    in_pool: Callable[[Iterable[Unit], ActorHandle], Iterator[Outcome]],
    alone: Callable[[Sequence[Unit]], Iterator[Outcome]],
    *,
    workers: int,
    advice: str = KEPT,
) -> Iterator[Outcome]:
    """Outcomes of all units in `todo`, first from a pool of so many, then of those set aside there.

    Raises:
        InputError, StageFailed: the job cannot go on, or so many in a row were set aside that the
            trouble is not theirs.
    """
    if not len(todo):
        return
    aside: list[Outcome] = []
    in_a_row, most = 0, max(ASIDE_IN_A_ROW, 4 * workers)
    with counted_attempts() as attempts:
        for outcome in in_pool((unit_of(int(unit)) for unit in todo), attempts):
            yield outcome
            in_a_row = in_a_row + 1 if outcome.suspect else 0
            if outcome.suspect:
                aside.append(outcome)
            if in_a_row >= most:
                raise StageFailed(
                    f"{outcome.suspect} (and {in_a_row - 1} units before it)\n{advice}"
                )
    if aside:
        say_step(f"{len(aside)} units were set aside and are now tried alone; {aside[0].suspect}")
        yield from alone([unit_of(outcome.unit) for outcome in aside])


def run_alone(
    units: Sequence[Unit],
    work: Callable[[Unit, Any], Outcome],
    task: Any,
    *,
    advice: str = KEPT,
    **resources: float,
) -> Iterator[Outcome]:
    """Tries units that were set aside in a process of their own, three times at most."""
    # A process that served one unit is not used for the next.
    alone = ray.remote(max_retries=0, max_calls=1, **resources)(work)
    running = {alone.remote(unit, task): (unit, 0) for unit in units}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        unit, deaths = running.pop(done)
        try:
            outcome: Outcome = ray.get(done)
        except (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError):
            pass  # The node went, not the process.
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            deaths += 1
            if deaths >= DEATHS_ALONE:
                reason = f"killed its process {DEATHS_ALONE} times: {_first_line(error)}"
                yield Outcome(unit=unit.index, rejected=reason)
                continue
        else:
            yield outcome.check(advice)
            continue
        running[alone.remote(unit, task)] = (unit, deaths)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def killer(unit: AnyUnit) -> Outcome:
    """Of a unit with which processes of the pool died."""
    return Outcome(unit=unit.index, suspect=f"unit {unit.name}: killed its process twice")


def tried_in_pool(
    unit: Unit, work: Callable[[Unit], Outcome], attempts: ActorHandle | None
) -> Outcome:
    """Outcome of a unit in a pool. What killed its process or failed is set aside: it may have been
    of that place and moment only (a store, memory)."""
    with attempt(attempts, f"unit {unit.index}") as deaths:
        if deaths >= DEATHS_IN_POOL:
            return killer(unit)
        outcome = work(unit)
        return Outcome(unit=unit.index, suspect=outcome.failed) if outcome.failed else outcome


def in_actors(
    dataset: ray.data.Dataset,
    actor: type,
    arguments: dict[str, Any],
    *,
    least: int,
    most: int,
    **resources: float,
) -> ray.data.Dataset:
    """`dataset`, of a unit in each block, mapped by a pool of so many actors."""
    return dataset.map_batches(
        actor,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_tasks_in_flight_per_actor=UNITS_PER_ACTOR,
            max_concurrent_calls_per_actor=UNITS_AT_WORK,
            enable_true_multi_threading=True,
        ),
        **resources,
    )
