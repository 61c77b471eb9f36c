"""The ledger of `tokenize` and `render`: which units there are, and what of them is done.

A unit is a row range of one image part and becomes one file. Which units there are depends on the
image table and `rows_per_unit` only. While a table is unfinished its directory has `_work/`:

- `identity.json`: what the rows depend on; another identity refuses to go on here.
- `receipts-*.jsonl`: one line `[unit, bytes, hash, checksum]` for a file that was written.
- `rejected-<file>.json`: a unit that was given up, with its reason.

All state lives in arrays: 24 bytes a unit, whatever the number of images.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import storage
from pipelines.errors import InputError, parsing
from pipelines.lease import Fence
from pipelines.records import check_values, read_values
from pipelines.tables.token_files import IdentityRecord, completed
from pipelines.tables.unit_files import (
    MANIFEST,
    RejectedRecord,
    RejectedUnit,
    UnitFile,
    differing_field,
    encode_manifest,
    file_name,
)
from pipelines.units import work_uri

IDENTITY = "identity.json"
HASH_BYTES = 16
REMEDY = "give another output, or remove _work/ in this one"
NUM_THREADS = 16
SAVE_EVERY_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """All units in row order, column by column."""

    part: NDArray[np.int32]
    start: NDArray[np.int32]
    """First row, counted inside the part."""
    stop: NDArray[np.int32]
    first: NDArray[np.int64]
    """First row, counted over the table."""
    part_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.part)

    def rows(self, unit: int) -> int:
        return int(self.stop[unit] - self.start[unit])

    def name(self, unit: int) -> str:
        """The file of a unit."""
        part = self.part_names[self.part[unit]]
        return file_name(part, int(self.start[unit]), int(self.stop[unit]))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of every unit."""
        return (self.stop - self.start).astype(np.int64)


def plan_units(part_names: Sequence[str], part_rows: Sequence[int], rows_per_unit: int) -> Units:
    """Cuts every part into units of at most `rows_per_unit` rows, as even as can be."""
    rows = np.asarray(part_rows, np.int64)
    pieces = -(-rows // rows_per_unit)
    part = np.repeat(np.arange(len(rows)), pieces)
    # Number of the piece inside its part.
    piece = np.arange(len(part)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = piece * rows[part] // pieces[part]
    stop = (piece + 1) * rows[part] // pieces[part]
    return units_of(part_names, rows, part, start, stop)


def units_of(
    part_names: Sequence[str],
    part_rows: Sequence[int] | NDArray[np.int64],
    part: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> Units:
    """The units of these rows [start, stop) of parts of so many rows."""
    part_start = np.concatenate([[0], np.cumsum(part_rows, dtype=np.int64)])
    return Units(
        part=part.astype(np.int32),
        start=start.astype(np.int32),
        stop=stop.astype(np.int32),
        first=part_start[part] + start,
        part_names=part_names,
    )


class Ledger:
    """Which units are committed, with size and hash; which are rejected."""

    def __init__(
        self,
        uri: str,
        units: Units,
        fence: Fence | None = None,
        *,
        form: type[Any] = IdentityRecord,
    ) -> None:
        """`form` is that of the identity's record."""
        self.uri = uri
        self.units = units
        self.fence = fence
        self.form = form
        self.finished = False
        self.size = np.full(len(units), -1, np.int64)
        self.hash = np.zeros((len(units), HASH_BYTES), np.uint8)
        self.rejected: dict[int, str] = {}
        self.rows_done = 0
        self._parts = {
            name.removesuffix(".parquet"): index for index, name in enumerate(units.part_names)
        }
        self._unsaved: list[tuple[int, int, str]] = []
        # Two drivers on one output keep apart; the name is in no finished table.
        self._writer = uuid.uuid4().hex[:12]
        self._written = 0
        self._saved = time.monotonic()

    # -- what is there ---------------------------------------------------------------------

    def claim(self, wanted: Mapping[str, Any]) -> None:
        """Marks the output as being made with these values: the identity, and options.

        Raises:
            InputError: it was begun with others; names the field and both values.
        """
        if not self.refuse_other(wanted):
            record = storage.canonical_json(wanted)
            if not storage.create(work_uri(self.uri, IDENTITY), record, check=self._check):
                self.refuse_other(wanted)

    def refuse_other(self, wanted: Mapping[str, Any]) -> bool:
        """Whether the output was begun. Raises InputError if it was with other values of these."""
        wanted = json.loads(storage.canonical_json(wanted))
        try:
            found = read_values(work_uri(self.uri, IDENTITY), self.form, REMEDY)
        except FileNotFoundError:
            return False
        refuse_other_options(self.uri, found, wanted)
        return True

    def _check(self) -> None:
        """Before each write. Raises LeaseLost when another driver has taken over."""
        if self.fence is not None:
            self.fence.check()

    def load(self) -> NDArray[np.int64]:
        """Reads what earlier runs did; returns units whose file is there without a receipt."""
        listed = self._list()
        notes = storage.list_files(work_uri(self.uri), recursive=False)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            # A long job on S3 leaves thousands of small files.
            found = pool.map(lambda info: (info.path, self._read_note(info.path)), notes)
            for name, data in found:
                if name.startswith("receipts-"):
                    self._read_receipts(data, listed)
                elif name.startswith("rejected-") and data:
                    path = work_uri(self.uri, name)
                    with parsing(path, "remove it, and its unit is tried again"):
                        record = check_values(json.loads(data), RejectedRecord, path, REMEDY)
                    unit = self.find(record["part"], record["start"], record["stop"])
                    if unit is not None:
                        self.rejected[unit] = record["reason"]
        for done in np.flatnonzero(self.size >= 0):
            self.rejected.pop(int(done), None)
        return np.flatnonzero((listed >= 0) & (self.size < 0))

    def _read_note(self, name: str) -> bytes:
        try:
            return storage.read_bytes(work_uri(self.uri, name))
        except FileNotFoundError:
            # Without a lease (a dry run): the driver at work has just cleared its notes.
            return b""

    def _write_note(self, name: str, data: bytes) -> None:
        storage.write_bytes(work_uri(self.uri, name), data, check=self._check)

    def _list(self) -> NDArray[np.int64]:
        """Bytes of the file of every unit, -1 where there is none."""
        listed = np.full(len(self.units), -1, np.int64)
        for info in storage.list_files(self.uri, ".parquet", recursive=False):
            stem, _, span = info.path.removesuffix(".parquet").rpartition("-")
            stem, _, begin = stem.rpartition("-")
            if stem in self._parts and begin.isdigit() and span.isdigit():
                unit = self.find(self._parts[stem], int(begin), int(span))
                if unit is not None:
                    listed[unit] = info.size
        return listed

    def find(self, part: int, start: int, stop: int) -> int | None:
        """The unit of this row range, or None."""
        # Of the column's own type: another one would have numpy copy the column at each call.
        bounds = np.array([part, part + 1], self.units.part.dtype)
        low, high = np.searchsorted(self.units.part, bounds)
        unit = int(low + np.searchsorted(self.units.start[low:high], start))
        if unit < high and self.units.start[unit] == start and self.units.stop[unit] == stop:
            return unit
        return None

    def _read_receipts(self, data: bytes, listed: NDArray[np.int64]) -> None:
        for line in data.splitlines():
            receipt = _receipt(line)
            # A unit whose receipt is damaged has one no more, and its file is read and judged.
            if receipt and receipt[0] < len(listed) and listed[receipt[0]] == receipt[1]:
                self._set(*receipt)

    # -- what is new -----------------------------------------------------------------------

    def _set(self, unit: int, size: int, digest: str) -> None:
        if self.size[unit] < 0:
            self.rows_done += self.units.rows(unit)
        self.size[unit] = size
        self.hash[unit] = np.frombuffer(bytes.fromhex(digest), np.uint8)

    def add(self, unit: int, size: int, digest: str) -> None:
        """Notes that the file of a unit is written; `save` makes the note durable."""
        self._set(unit, size, digest)
        self.rejected.pop(unit, None)
        self._unsaved.append((unit, size, digest))

    def forget(self, unit: int) -> None:
        """Takes a unit back: its file is gone or is not what the receipt says."""
        if self.size[unit] >= 0:
            self.rows_done -= self.units.rows(unit)
        self.size[unit] = -1

    def save_now_and_then(self) -> None:
        """`save`, if the last time was a while ago."""
        if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        """Writes new receipts into one small file."""
        if not self._unsaved:
            return
        lines = [json.dumps([*receipt, _checksum(receipt)]) + "\n" for receipt in self._unsaved]
        name = f"receipts-{self._writer}-{self._written:06d}.jsonl"
        self._write_note(name, "".join(lines).encode())
        self._written += 1
        self._unsaved = []

    def reject(self, unit: int, reason: str) -> None:
        """Notes durably that a unit is given up."""
        self.rejected[unit] = reason
        record = {
            "part": int(self.units.part[unit]),
            "start": int(self.units.start[unit]),
            "stop": int(self.units.stop[unit]),
            "reason": reason,
        }
        self._write_note(self._rejected_name(unit), storage.canonical_json(record))

    def retry_rejected(self) -> None:
        """Forgets every rejection."""
        self._check()
        for unit in self.rejected:
            storage.delete(work_uri(self.uri, self._rejected_name(unit)))
        self.rejected = {}

    def _rejected_name(self, unit: int) -> str:
        return f"rejected-{self.units.name(unit)}.json"

    # -- questions -------------------------------------------------------------------------

    @property
    def done(self) -> NDArray[np.bool_]:
        return self.size >= 0

    @property
    def rows_settled(self) -> int:
        """Rows of the units that are committed or rejected."""
        return self.rows_done + sum(self.units.rows(unit) for unit in self.rejected)

    def todo(self) -> NDArray[np.int64]:
        """Units that are neither committed nor rejected, in order."""
        missing = ~self.done
        missing[list(self.rejected)] = False
        return np.flatnonzero(missing)

    def changed_files(self) -> list[int]:
        """Units whose file is not there in the size of its receipt."""
        return [int(unit) for unit in np.flatnonzero(self.done & (self._list() != self.size))]

    def files(self) -> Iterator[UnitFile]:
        """The committed files in row order."""
        units = self.units
        for unit in np.flatnonzero(self.done):
            yield UnitFile(
                part=int(units.part[unit]),
                start=int(units.start[unit]),
                stop=int(units.stop[unit]),
                size=int(self.size[unit]),
                hash=self.hash[unit].tobytes().hex(),
            )

    def rejected_units(self) -> list[RejectedUnit]:
        return [
            RejectedUnit(
                part=int(self.units.part[unit]),
                start=int(self.units.start[unit]),
                stop=int(self.units.stop[unit]),
                reason=reason,
            )
            for unit, reason in sorted(self.rejected.items())
        ]

    def load_manifest(self, manifest: dict[str, Any]) -> None:
        """Takes over the files and rejections of a finished table."""
        self.finished = True
        files = manifest["files"]
        columns = (files[name] for name in ("part", "start", "stop", "size", "hash"))
        for part, start, stop, size, digest in zip(*columns, strict=True):
            unit = self.find(part, start, stop)
            if unit is not None:
                self._set(unit, size, digest)
        for record in manifest["rejected"]:
            unit = self.find(record["part"], record["start"], record["stop"])
            if unit is not None:
                self.rejected[unit] = record["reason"]

    def commit(self, manifest: dict[str, Any]) -> None:
        """Makes the table exist, or mends one that was finished before.

        Raises:
            InputError: another driver has finished another table there.
        """
        path, data = storage.join(self.uri, MANIFEST), encode_manifest(manifest)
        if self.finished:
            storage.write_bytes(path, data, check=self._check)
        elif not storage.created_or_equal(path, data, check=self._check):
            raise InputError(
                f"{self.uri}: another run has just finished a table there that differs from this "
                "one; give another output"
            )

    def clear(self) -> None:
        """Removes the traces of the work."""
        self._check()
        storage.delete_prefix(work_uri(self.uri))


def _checksum(receipt: Sequence[Any]) -> str:
    return storage.digest(json.dumps(list(receipt)).encode())[:8]


def _receipt(line: bytes) -> tuple[int, int, str] | None:
    """What a line of receipts says, or None if it is damaged."""
    try:
        unit, size, digest, *checksum = json.loads(line)
        numbers = type(unit) is type(size) is int and unit >= 0
        whole = numbers and len(bytes.fromhex(digest)) == HASH_BYTES
    except (ValueError, TypeError, RecursionError):
        return None
    # Those of release 0.1.0 have none.
    if not whole or checksum not in ([], [_checksum([unit, size, digest])]):
        return None
    return unit, size, digest


def refuse_other_options(uri: str, found: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError if an output was made, or begun, with other options."""
    found = completed(found)
    difference = differing_field({name: found.get(name) for name in wanted}, wanted)
    if difference:
        raise InputError(
            f"{uri}: {difference} (what this output was begun with != what is asked for now); "
            "use the earlier options to go on, or another output"
        )
