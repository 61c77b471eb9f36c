"""Where the row groups of a table lie: the arithmetic between row ids and pieces to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The smallest piece worth reading."""

    part: int
    """Position of the part in the manifest."""
    index: int
    """Position of the row group in its part."""
    start: int
    """Row id of its first row."""
    rows: int


class RowGroups(Sequence[RowGroup]):
    """All row groups of a table in row order; a billion images have some millions of them.

    Made from the rows of each row group of each part.
    """

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        sizes = [np.asarray(rows, dtype=np.int64) for rows in parts]
        counts = np.asarray([len(size) for size in sizes], dtype=np.int64)
        self.sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.part = np.repeat(np.arange(len(parts)), counts)
        first = np.cumsum(counts) - counts
        self.within = np.arange(len(self.sizes)) - np.repeat(first, counts)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, position: int) -> RowGroup: ...
    @overload
    def __getitem__(self, position: slice) -> list[RowGroup]: ...
    def __getitem__(self, position: int | slice) -> RowGroup | list[RowGroup]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        i = range(len(self))[position]
        return RowGroup(
            part=int(self.part[i]),
            index=int(self.within[i]),
            start=int(self.starts[i]),
            rows=int(self.sizes[i]),
        )

    def overlapping(self, start: int, stop: int) -> range:
        """Positions of the row groups that hold rows [start, stop)."""
        if start >= stop:
            return range(0)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        return range(first, last)
