"""What token tables and view tables share: one file for each unit of rows, listed in a manifest.

A *unit* is a contiguous row range of one part of an image table; its file is named for it. The
manifest, written last, lists the files column by column (250,000 files, enough for 10^9 images,
are 21 MB) and carries its own hash, so that a field changed afterwards is found.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from pipelines import storage
from pipelines.errors import InputError
from pipelines.records import Count, FileName, Hash, check_values, refuse_other_kinds

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFile:
    """One file of the table."""

    part: int
    """Index of the image part."""
    start: int
    """First row, counted inside the part."""
    stop: int
    size: int
    """Bytes."""
    hash: str
    """BLAKE2b-128 of the bytes."""


@dataclass(frozen=True, kw_only=True)
class RejectedUnit:
    """A row range without a file and the reason why."""

    part: int
    start: int
    stop: int
    reason: str


class FileColumns(TypedDict):
    """The files, column by column (`UnitFile`)."""

    part: list[Count]
    start: list[Count]
    stop: list[Count]
    size: list[Count]
    hash: list[Hash]


class RejectedRecord(TypedDict):
    """A `RejectedUnit`."""

    part: Count
    start: Count
    stop: Count
    reason: str


class PartColumns(TypedDict):
    """The parts of the image table."""

    name: list[FileName]
    rows: list[Count]


def file_name(part: str, start: int, stop: int) -> str:
    """Name of the file of rows [start, stop) of the image part named `part`."""
    return f"{part.removesuffix('.parquet')}-{start:08d}-{stop:08d}.parquet"


def differing_field(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """`name: expected != found` of the first differing field, or None."""
    for name in sorted(expected.keys() | found.keys()):
        left, right = expected.get(name), found.get(name)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            return f"{name}.{differing_field(left, right)}"
        return f"{name}: {left!r} != {right!r}"
    return None


def manifest_of(
    values: Mapping[str, Any], files: Iterable[UnitFile], rejected: Sequence[RejectedUnit]
) -> dict[str, Any]:
    """The manifest of a finished table: `values`, its files in row order, its fingerprint."""
    # Columns instead of one object a file: a fifth of the memory where files are many.
    columns: dict[str, list[Any]] = {name: [] for name in FileColumns.__annotations__}
    for file in files:
        for name, column in columns.items():
            column.append(getattr(file, name))
    manifest = {
        **values,
        "files": columns,
        "rejected": [
            asdict(unit) for unit in sorted(rejected, key=lambda unit: (unit.part, unit.start))
        ],
    }
    return manifest | {"fingerprint": storage.digest(encode_manifest(manifest))}


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """`storage.canonical_json`, piece by piece: no list of ten million small strings."""
    encoder = json.JSONEncoder(indent=1, sort_keys=True, ensure_ascii=False)
    text = io.BytesIO()
    for piece in encoder.iterencode(manifest):
        text.write(piece.encode())
    text.write(b"\n")
    return text.getvalue()


def read_manifest(
    uri: str, form: Any, *, kind: str, versions: Sequence[int], remedy: str
) -> dict[str, Any]:
    """The manifest of the table at `uri`, of this form.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is of something else, or damaged.
    """
    path = storage.join(uri, MANIFEST)
    manifest: dict[str, Any] = storage.read_json(path)
    refuse_other_kinds(manifest, path, kind=kind, versions=versions)
    check_values(manifest, form, path, remedy)
    return manifest


class UnitTable:
    """A finished table of such files: where its rows are."""

    again: str
    """What to do where the table was altered."""

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self.image_fingerprint: str = manifest["image_fingerprint"]
        self.views = range(*manifest["views"])
        self.part_names: list[str] = manifest["parts"]["name"]
        self.part_starts: NDArray[np.int64] = np.concatenate(
            [[0], np.cumsum(manifest["parts"]["rows"], dtype=np.int64)]
        )
        files = manifest["files"]
        self._size: list[int] = files["size"]
        self._hash: list[str] = files["hash"]
        self._part = np.asarray(files["part"], np.int64)
        self._start = np.asarray(files["start"], np.int64)
        self._stop = np.asarray(files["stop"], np.int64)
        # First row of each file and the row after its last, counted over the whole table.
        self._first = self.part_starts[self._part] + self._start
        self._last = self.part_starts[self._part] + self._stop
        self.num_missing = self.num_rows - int((self._last - self._first).sum())

    @property
    def num_files(self) -> int:
        return len(self._part)

    def file_name(self, index: int) -> str:
        """Name of the file number `index` in row order."""
        part = self.part_names[self._part[index]]
        return file_name(part, int(self._start[index]), int(self._stop[index]))

    def file_uri(self, index: int) -> str:
        """Address of that file."""
        return storage.join(self.uri, self.file_name(index))

    def file_rows(self, index: int) -> range:
        """Rows of the table that file number `index` holds."""
        return range(int(self._first[index]), int(self._last[index]))

    def file_record(self, index: int) -> tuple[int, str]:
        """Size and hash of file number `index`."""
        return self._size[index], self._hash[index]

    def have_file(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows of the image table are in a file: all but those of rejected units."""
        index = np.searchsorted(self._last, rows, side="right")
        inside = index < self.num_files
        inside[inside] = self._first[index[inside]] <= rows[inside]
        return inside

    def check_fingerprint(self) -> None:
        """Raises InputError if the manifest is not what was written."""
        content = {name: value for name, value in self.manifest.items() if name != "fingerprint"}
        actual = storage.digest(encode_manifest(content))
        if actual != self.fingerprint:
            raise InputError(
                f"{storage.join(self.uri, MANIFEST)}: fingerprint {self.fingerprint!r} != "
                f"{actual!r}, the hash of the other fields; the manifest was altered: {self.again}"
            )

    def check_stamp(self, stamp: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Raises InputError if the first file was written with another identity."""
        difference = differing_field(identity, stamp)
        if difference:
            raise InputError(
                f"{storage.join(self.uri, MANIFEST)}: {difference} (manifest != what "
                f"{self.file_name(0)} was written with); the table was altered: {self.again}"
            )
