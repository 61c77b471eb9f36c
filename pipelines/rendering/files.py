"""Files of a view table in the making: views of one image after the other, in the order of rows.

What `render` does with the rows of a unit, and what `tokenize --store_views` does in passing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from beit.views import Interpolation, view_of
from pipelines import storage
from pipelines.tables.image_files import Part
from pipelines.tables.unit_files import file_name
from pipelines.tables.view_files import (
    ViewIdentity,
    cut_row_groups,
    encode_file,
    encode_view,
    schema,
)

INTERPOLATION: Interpolation = "bicubic"


@dataclass(frozen=True, kw_only=True)
class RenderTask:
    """What every worker is told."""

    images_uri: str
    output: str
    identity: ViewIdentity
    num_cpus: float
    rows_per_unit: int

    @property
    def memory(self) -> int:
        """Bytes a task needs: all stored views of a unit, and the file made of them."""
        identity = self.identity
        return 3 * self.rows_per_unit * identity.num_views * 3 * identity.image_size**2


def in_slots(rendered: Sequence[np.ndarray], digest: bytes, identity: ViewIdentity) -> list[bytes]:
    """The views of one image, in their order, as they are stored: slot by slot."""
    places = range(len(rendered))
    shown = [view_of(digest, slot, range(*identity.views)) for slot in places]
    return [encode_view(rendered[view - identity.views[0]], identity.form) for view in shown]


def row_groups(part: Part, start: int, stop: int, most: int) -> list[int]:
    """Row groups of the file of rows [start, stop) of a part: those between them."""
    cut = cut_row_groups(part.row_groups, most)
    starts = np.cumsum([0, *cut[:-1]])
    inside = (starts >= start) & (starts < stop)
    return [rows for rows, chosen in zip(cut, inside, strict=True) if chosen]


class ViewFile:
    """The file of rows [start, stop) of a part."""

    def __init__(self, task: RenderTask, part: Part, start: int, stop: int) -> None:
        self._task, self._part, self._start, self._stop = task, part, start, stop
        self._columns: list[list[Any]] = [[] for _ in schema(task.identity)]

    def add(self, key: str, digest: bytes, rendered: Sequence[np.ndarray]) -> None:
        """The next row, with its views in their order."""
        stored = in_slots(rendered, digest, self._task.identity)
        for column, value in zip(self._columns, [key, digest, *stored], strict=True):
            column.append(value)

    def write(self) -> tuple[int, str]:
        """Writes the file, whose rows are all there; returns its size and hash."""
        identity = self._task.identity
        names = schema(identity)
        columns = [
            pa.array(values, names.field(number).type)
            for number, values in enumerate(self._columns)
        ]
        groups = row_groups(self._part, self._start, self._stop, identity.row_group_rows)
        data = encode_file(pa.Table.from_arrays(columns, schema=names), groups, identity)
        name = file_name(self._part.name, self._start, self._stop)
        storage.write_bytes(storage.join(self._task.output, name), data)
        return data.size, storage.digest(data)


class ViewFiles:
    """Files that are made in passing, while the rows of a part go by in ascending order.

    One with an image that does not decode is left to `render`, which says so.
    """

    def __init__(self, task: RenderTask | None, part: Part, units: Iterable[Sequence[int]]) -> None:
        """`units` are the index, first row and end of each file, in ascending order."""
        self._task, self._part = task, part
        self._units = list(units) if task else []
        self._file: ViewFile | None = None
        self.receipts: list[tuple[int, int, str]] = []
        """Index, size and hash of the files that were written."""

    @property
    def output(self) -> tuple[int, Interpolation]:
        """Side and filter of the views."""
        assert self._task
        return self._task.identity.image_size, INTERPOLATION

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The rows from `start` to `stop` and those of the files."""
        bounds = [start, stop, *(bound for _, *unit in self._units for bound in unit)]
        return min(bounds), max(bounds)

    def want(self, row: int) -> bool:
        """Whether the views of this row belong into one of the files."""
        return bool(self._units) and self._units[0][1] <= row

    def add(self, row: int, key: str, digest: bytes, rendered: Sequence[np.ndarray]) -> None:
        """The views of a row that they want; the file whose last one this is, is written."""
        assert self._task
        index, start, stop = self._units[0]
        if self._file is None:
            self._file = ViewFile(self._task, self._part, start, stop)
        self._file.add(key, digest, rendered)
        if row == stop - 1:
            self.receipts.append((index, *self._file.write()))
            self.drop()

    def drop(self) -> None:
        """The file at hand is done, or is not to be had."""
        self._units, self._file = self._units[1:], None
