"""The order of samples as a pure function of (seed, epoch, global batch size, shards, window).

    permute row groups -> concatenate -> rotate -> cut into C equal canonical shards
    -> permute rows inside windows of W -> step s takes the next G/C rows of every shard

Rank r of n owns C/n of the shards, so the global batch of a step is the same for every number of
workers, and a run resumes from nothing but its step number. A window touches few row groups: it
is the unit that executors read. `docs/sample_order.md` says why each of these steps is there.

Nothing here depends on the version of numpy: permutations are stable sorts of raw Philox words.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from beit import counters
from pipelines.errors import InputError

# Raised whenever the same arguments would give another order.
VERSION: Final = 1
DEFAULT_NUM_SHARDS: Final = 8
DEFAULT_WINDOW: Final = 512


@dataclass(frozen=True, kw_only=True)
class WindowRead:
    """What one window of one shard reads, and in which order its rows are used.

    ``runs`` are ranges [start, stop) of row ids; their rows, one after the other, are taken in
    the order of ``permutation``.
    """

    runs: tuple[tuple[int, int], ...]
    permutation: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows in the window."""
        return len(self.permutation)

    def row_ids(self) -> np.ndarray:
        """int64 (num_rows,), in the order of use."""
        rows: np.ndarray = _concatenate(self.runs)[self.permutation]
        return rows


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """Row groups in this epoch's order: first row id of each, and where each ends in the row."""

    first_rows: np.ndarray
    ends: np.ndarray
    rotation: int


class SampleOrder:
    """Which rows make up each step, for every rank. Cheap for 10^9 rows; safe to share by threads.

    ``row_group_sizes`` are the rows of every row group of the table, in global row order. Raises
    `InputError` where ``global_batch_size``, ``num_shards`` and the table do not fit together.
    """

    def __init__(
        self,
        row_group_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        num_shards: int = DEFAULT_NUM_SHARDS,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self._sizes = np.asarray(row_group_sizes, np.int64)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.num_shards = num_shards
        self.window = window
        self.num_rows = int(self._sizes.sum())
        self._check()
        self.shard_batch_size = global_batch_size // num_shards
        self.steps_per_epoch = self.num_rows // global_batch_size
        self.rows_per_shard = self.steps_per_epoch * self.shard_batch_size
        self._first_rows = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self._epochs: dict[int, _Epoch] = {}

    def _check(self) -> None:
        for name, value in (
            ("global_batch_size", self.global_batch_size),
            ("num_shards", self.num_shards),
            ("window", self.window),
        ):
            if value < 1:
                raise InputError(f"{name} = {value}: give a number of at least 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed = {self.seed}: give an integer in [0, 2**64)")
        if self._sizes.ndim != 1 or (self._sizes < 0).any():
            raise InputError("row_group_sizes: give one row count >= 0 for every row group")
        if self.global_batch_size % self.num_shards:
            raise InputError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of num_shards = "
                f"{self.num_shards}: choose a multiple, or fewer shards"
            )
        if self.global_batch_size > self.num_rows:
            raise InputError(
                f"global_batch_size = {self.global_batch_size} exceeds the {self.num_rows} rows of "
                "the table: choose a smaller batch or give more images"
            )

    @property
    def num_windows(self) -> int:
        """Windows of each shard; the last may be shorter."""
        return -(-self.rows_per_shard // self.window)

    def to_dict(self) -> dict[str, int | str]:
        """Everything the order depends on; equal dictionaries mean equal orders (checkpoints)."""
        sizes = hashlib.blake2b(self._sizes.astype("<i8").tobytes(), digest_size=16).hexdigest()
        return {
            "version": VERSION,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_shards": self.num_shards,
            "window": self.window,
            "num_rows": self.num_rows,
            "row_groups": sizes,
        }

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from the start of the run."""
        return divmod(step, self.steps_per_epoch)

    def shards_of(self, rank: int, num_ranks: int) -> range:
        """The canonical shards of one rank. Raises `InputError` unless ranks divide shards."""
        if num_ranks < 1 or self.num_shards % num_ranks:
            raise InputError(
                f"num_workers = {num_ranks} does not divide num_shards = {self.num_shards}: "
                f"choose one of {_divisors(self.num_shards)} workers, or another num_shards"
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank = {rank} of {num_ranks}")
        share = self.num_shards // num_ranks
        return range(rank * share, (rank + 1) * share)

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """Row ids of one step, int64 (global_batch_size,), the same for any number of ranks."""
        return self.rank_batch(epoch, step, 0, 1)

    def rank_batch(self, epoch: int, step: int, rank: int, num_ranks: int) -> np.ndarray:
        """Row ids of one step for one rank, int64 (global_batch_size / num_ranks,).

        Joined over the ranks, in their order, they are the global batch.
        """
        parts = []
        for shard in self.shards_of(rank, num_ranks):
            for window, start, stop in self.windows_of(step):
                parts.append(self.read_of(epoch, shard, window).row_ids()[start:stop])
        return np.concatenate(parts)

    def windows_of(self, step: int) -> list[tuple[int, int, int]]:
        """(window, start, stop): what a step takes from the rows in use order of each window.

        The same for every shard. Raises ValueError outside of the epoch.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step = {step}: the epoch has steps 0 to {self.steps_per_epoch - 1}")
        start, stop = step * self.shard_batch_size, (step + 1) * self.shard_batch_size
        pieces = []
        for window in range(start // self.window, (stop - 1) // self.window + 1):
            base = window * self.window
            pieces.append((window, max(start - base, 0), min(stop - base, self.window)))
        return pieces

    def read_of(self, epoch: int, shard: int, window: int) -> WindowRead:
        """The row ranges behind one window of one shard, and the order its rows are used in."""
        if epoch < 0 or not 0 <= shard < self.num_shards or not 0 <= window < self.num_windows:
            raise ValueError(f"no window {window} of shard {shard} in epoch {epoch}")
        start = shard * self.rows_per_shard + window * self.window
        length = min(self.window, self.rows_per_shard - window * self.window)
        return WindowRead(
            runs=self._runs(epoch, start, start + length),
            permutation=_window_permutation(self.seed, epoch, shard, window, length),
        )

    def _runs(self, epoch: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """Row ranges at positions [start, stop) of the rotated concatenation."""
        plan = self._plan(epoch)
        start, stop = start + plan.rotation, stop + plan.rotation
        if stop > self.num_rows:  # The rotation puts the beginning of the row behind its end.
            pieces = [(start % self.num_rows, self.num_rows), (0, stop - self.num_rows)]
            if start >= self.num_rows:
                pieces = [(start - self.num_rows, stop - self.num_rows)]
        else:
            pieces = [(start, stop)]
        runs: list[tuple[int, int]] = []
        for low, high in pieces:
            position = low
            group = int(np.searchsorted(plan.ends, low, side="right"))
            while position < high:
                end = int(plan.ends[group])
                first = int(plan.first_rows[group])
                size = end - (int(plan.ends[group - 1]) if group else 0)
                run = (first + size - (end - position), first + size - (end - min(end, high)))
                if run[0] < run[1]:
                    if runs and runs[-1][1] == run[0]:
                        runs[-1] = (runs[-1][0], run[1])
                    else:
                        runs.append(run)
                position = max(position, min(end, high))
                group += 1
        return tuple(runs)

    def _plan(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            start = (epoch, 0, 0)
            order = _shuffled(self.seed, counters.ORDER_GROUPS, start, len(self._sizes))
            word = counters.words(self.seed, counters.ORDER_ROTATION, start, 1)[0]
            rotation = int(word) % self.num_rows
            plan = _Epoch(
                first_rows=self._first_rows[order],
                ends=np.cumsum(self._sizes[order]),
                rotation=rotation,
            )
            # This epoch and the one that prefetching has reached; a race merely does work twice.
            kept = sorted(self._epochs.items())[-1:]
            self._epochs = dict([*kept, (epoch, plan)])
        return plan


def _shuffled(seed: int, domain: int, position: counters.Position, length: int) -> np.ndarray:
    """A permutation of range(length), int64."""
    return np.argsort(counters.words(seed, domain, position, length), kind="stable")


@functools.lru_cache(maxsize=256)
def _window_permutation(seed: int, epoch: int, shard: int, window: int, length: int) -> np.ndarray:
    """Read-only, because it is shared: consecutive steps ask for the same few."""
    order = _shuffled(seed, counters.ORDER_WINDOWS, (epoch, shard, window), length)
    order.setflags(write=False)
    return order


def _concatenate(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in runs])


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)
