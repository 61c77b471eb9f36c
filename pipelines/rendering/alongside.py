"""View files that `tokenize` makes in the same pass: the driver's part.

A view file is given to the task of the token unit that its middle row is in; that task reads and
decodes the rows that the file has beyond its own. Only this work is shared: each table has its
units, lease, ledger and manifest. What no task of the pass made (tokens were there before, a unit
was set aside or rejected), and the manifest of the view table, are left to `render`, which follows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipelines import lease, unit_tables
from pipelines.rendering.plan import RenderPlan
from pipelines.tokenization.ledger import Ledger, Units
from pipelines.units import Outcome


class Alongside:
    """Which view files the task of a token unit makes, and their receipts."""

    def __init__(self, ledger: Ledger, todo: np.ndarray, token_units: Units) -> None:
        """`todo` are the units of the view table that are to be made."""
        self._ledger, self._todo = ledger, todo
        units = ledger.units
        middle = units.first[todo] + units.sizes[todo] // 2
        self._owner = np.searchsorted(token_units.first, middle, side="right") - 1

    def of(self, token_unit: int) -> tuple[tuple[int, int, int], ...]:
        """Index, first row and end of the files to be made with this unit, in ascending order."""
        units = self._ledger.units
        low, high = np.searchsorted(self._owner, [token_unit, token_unit + 1])
        return tuple(
            (int(unit), int(units.start[unit]), int(units.stop[unit]))
            for unit in self._todo[low:high]
        )

    def book(self, receipts: Sequence[tuple[int, int, str]]) -> None:
        """Enters index, size and hash of files that were made.

        Raises:
            InputError: the worker's disk is not the driver's.
        """
        for unit, size, digest in receipts:
            done = Outcome(unit=unit, facts={"size": size, "hash": digest})
            unit_tables.book(done, self._ledger, 0)
        self._ledger.save_now_and_then()


@contextmanager
def alongside(plan: RenderPlan | None, token_units: Units) -> Iterator[Alongside | None]:
    """Inside, this driver alone writes the view table of `plan`, if there are files to be made.

    Raises:
        StageFailed: another one does, whose heart beats, and `lease.when_held` is `stop`.
        InputError: the view table was begun with other options.
    """
    if plan is None or plan.take_up()[0].finished:
        yield None
        return
    with lease.held(plan.task.output, plan.config.lease, stage="tokenize") as holder:
        ledger, _ = plan.take_up(holder.fence)
        if not ledger.finished:  # by who had the lease before
            ledger.claim(plan.wanted)
            # Files without a receipt are read and judged by `render`.
            unverified = ledger.load()
            todo = np.setdiff1d(ledger.todo(), unverified)
            if len(todo):
                try:
                    yield Alongside(ledger, todo, token_units)
                finally:
                    ledger.save()
                return
    yield None  # The lease is free: others may close the table.
