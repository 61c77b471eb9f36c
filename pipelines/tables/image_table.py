"""The image table: the one form in which every later stage meets images.

A directory of `part-*.parquet`, `rejected.parquet`, `ignored.parquet` and, written last,
`manifest.json`. Rows are sorted by `key` through all parts, so a row's position is its identity
(row id). A *joined* table (`beit join`) is a manifest alone, whose parts lie in other tables.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NotRequired, Self

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from pipelines import storage
from pipelines.errors import InputError, parsing
from pipelines.records import Count, check_values, refuse_other_kinds
from pipelines.tables.image_files import Part, PartRecord, read_part, read_row_groups, schema_of
from pipelines.tables.row_groups import RowGroups

SCHEMA_VERSION = 1
JOINED_VERSION = 2
"""Of a table whose parts are those of others; readers of version 1 refuse it."""
KIND = "image_table"
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
IGNORED = "ignored.parquet"
READ_THREADS = 8

REMEDY = (
    "the manifest was changed after it was written: prepare the table again, or if it is a joined "
    "one, delete the manifest and `beit join` its tables again"
)


class JoinedRecord(TypedDict):
    """A table whose parts a joined table has."""

    uri: str
    fingerprint: str
    num_parts: Count
    labels: list[Count]
    """The label in the joined table for each of its own."""


class Manifest(TypedDict):
    """What must stand in the manifest of an image table."""

    kind: Literal["image_table"]
    schema_version: Literal[1, 2]
    fingerprint: str
    num_rows: Count
    num_items: Count
    bytes: Count
    class_names: list[str]
    class_counts: NotRequired[list[Count]]
    source: dict[str, Any]
    options: dict[str, Any]
    parts: list[Any]
    """Each a `PartRecord`."""
    tables: NotRequired[list[JoinedRecord]]
    """Of a joined table, in the order of its parts."""
    rejected: dict[str, Count]
    ignored: NotRequired[dict[str, Count]]
    pyarrow: str


def commit_manifest(
    uri: str,
    *,
    parts: Sequence[Part],
    class_names: Sequence[str],
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    rejected: Mapping[str, int],
    num_items: int,
    ignored: Mapping[str, int] | None = None,
    class_counts: Sequence[int] | None = None,
    tables: Sequence[JoinedRecord] = (),
) -> dict[str, Any]:
    """Writes `manifest.json`, which makes the table exist, and returns it.

    Args:
        parts: In row order.
        rejected: Number of rejected items by reason (they are listed in `rejected.parquet`).
        num_items: Items the source held: rows + rejected.
        ignored: Number of files beside the data by reason (they are listed in `ignored.parquet`).
        class_counts: Rows of each class, where they are known.
        tables: Of a joined table, those whose parts it has.

    Raises:
        InputError: another writer has made another table there in the meantime.
    """
    manifest = {
        "kind": KIND,
        "schema_version": JOINED_VERSION if tables else SCHEMA_VERSION,
        "fingerprint": table_fingerprint(parts, class_names, tables),
        "num_rows": sum(part.rows for part in parts),
        "num_items": num_items,
        "bytes": sum(part.bytes for part in parts),
        "class_names": list(class_names),
        **({} if class_counts is None else {"class_counts": list(class_counts)}),
        "source": dict(source),
        "options": dict(options),
        "parts": [part.to_dict() for part in parts],
        "rejected": dict(rejected),
        **({} if ignored is None else {"ignored": dict(ignored)}),
        **({"tables": list(tables)} if tables else {}),
        "pyarrow": pa.__version__,
    }
    path, data = storage.join(uri, MANIFEST), storage.canonical_json(manifest)
    # Two drivers of one job write the same bytes.
    if not storage.created_or_equal(path, data):
        raise InputError(
            f"{uri}: another run has just finished a table there that differs from this one; give "
            "another output"
        )
    return manifest


def table_fingerprint(
    parts: Sequence[Part], class_names: Sequence[str], tables: Sequence[JoinedRecord] = ()
) -> str:
    """Identity of a table's contents: its digests and labels in order, cut into parts as it is.

    Token tables name rows by part and position, so the cut belongs to the identity; keys,
    encodings of the files and where the table lies do not.
    """
    identity = {
        "schema_version": JOINED_VERSION if tables else SCHEMA_VERSION,
        "parts": [[part.rows, part.content] for part in parts],
        "class_names": list(class_names),
    }
    if tables:  # contents of parts have the labels that stand in the files
        identity["tables"] = [[table["num_parts"], table["labels"]] for table in tables]
    return storage.fingerprint(identity)


def split_position(group: str, *, seed: int = 0) -> float:
    """Where a leak group stands in [0, 1): a hash, the same in every table and on every machine."""
    raw = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little") / 2**64


def _labels_of_parts(
    tables: Sequence[JoinedRecord], count: int
) -> Iterator[tuple[int, ...] | None]:
    """`Part.labels` of each of so many parts; those of one table share it."""
    if not tables:
        return itertools.repeat(None, count)
    if sum(table["num_parts"] for table in tables) != count:
        raise ValueError(f"tables: num_parts are not the {count} parts listed")
    maps = [tuple(table["labels"]) for table in tables]
    pieces = zip(maps, tables, strict=True)
    return itertools.chain(*(itertools.repeat(one, table["num_parts"]) for one, table in pieces))


class ImageParts:
    """A finished image table at a URI, as its parts; safe to read from many threads.

    Enough for who gives out row ranges, or reads some rows. Of 10^9 images the index of row groups
    that `ImageTable` adds, 9 million of them, would be a third of a driver's memory.
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        """Takes the records of the parts out of `manifest`, each as soon as it is a part."""
        self.uri = uri
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self.class_names: list[str] = manifest["class_names"]
        self.joined: list[JoinedRecord] = manifest.get("tables", [])
        self.parts: list[Part] = []
        records = manifest.pop("parts")
        records.reverse()
        path = storage.join(uri, MANIFEST)
        with parsing(path, REMEDY):
            labels = _labels_of_parts(self.joined, len(records))
            while records:
                record = check_values(records.pop(), PartRecord, f"{path}: parts", REMEDY)
                part = Part.from_dict(record, next(labels))
                if bool(part.uri) != bool(self.joined):
                    raise ValueError(
                        f"{part.name}: parts have a uri in joined tables, and only there"
                    )
                self.parts.append(part)
        self.part_starts = np.cumsum([0, *(part.rows for part in self.parts)], dtype=np.int64)

    @classmethod
    def open(cls, uri: str) -> Self:
        """Reads the manifest.

        Raises:
            InputError: there is no finished table at `uri`, or its version is not ours.
        """
        uri = storage.absolute(uri)
        path = storage.join(uri, MANIFEST)
        try:
            manifest = storage.read_json(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{uri}: no finished image table ({MANIFEST} is missing); "
                "run `beit prepare` with this output, again if it was interrupted"
            ) from error
        refuse_other_kinds(manifest, path, kind=KIND, versions=(SCHEMA_VERSION, JOINED_VERSION))
        check_values(manifest, Manifest, path, REMEDY)
        table = cls(uri, manifest)
        expected = table_fingerprint(table.parts, table.class_names, table.joined)
        if expected != table.fingerprint or table.num_rows != table.part_starts[-1]:
            raise InputError(
                f"{path}: fingerprint {table.fingerprint} does not belong to the "
                f"{table.num_rows} rows and the parts listed ({expected}); {REMEDY}"
            )
        return table

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows [start, stop) in order, all columns or some; reads the row groups that hold them.

        Raises:
            IndexError: outside the table.
            InputError: a part is missing or damaged.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) of a table of {self.num_rows} rows")
        position = int(np.searchsorted(self.part_starts, start, side="right")) - 1
        pieces = [schema_of(columns).empty_table()]
        while start < stop:
            part, base = self.parts[position], int(self.part_starts[position])
            end = min(stop, base + part.rows)
            pieces.append(read_part(self.uri, part, start - base, end - base, columns))
            start, position = end, position + 1
        return pa.concat_tables(pieces)

    def read_scattered(
        self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Rows from anywhere in the table, each row group read once and held one at a time.

        Yields, row group by row group, positions in `rows` (ascending) and the rows that stand
        there. Ascending rows come in their order; rows may repeat.

        Raises:
            IndexError: outside the table.
            InputError: a part is missing or damaged.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a table of {self.num_rows}")
        part_of = np.searchsorted(self.part_starts, rows, side="right") - 1
        for position in np.unique(part_of).tolist():
            part, base = self.parts[position], self.part_starts[position]
            of_part = np.flatnonzero(part_of == position)
            starts = RowGroups([part.row_groups]).starts
            group_of = np.searchsorted(starts, rows[of_part] - base, side="right") - 1
            for group in np.unique(group_of).tolist():
                chosen = of_part[group_of == group]
                table = read_row_groups(self.uri, part, [group], columns)
                yield chosen, table.take(rows[chosen] - base - starts[group])

    def iter_parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """These small columns of every part in order, a few read ahead."""
        with ThreadPoolExecutor(READ_THREADS) as pool:
            step = 2 * READ_THREADS
            for first in range(0, len(self.parts), step):
                chunk = self.parts[first : first + step]
                yield from pool.map(
                    lambda part: read_part(self.uri, part, 0, part.rows, columns), chunk
                )

    def labels(self) -> np.ndarray:
        """int32 (num_rows,): class of each row, -1 where it has none."""
        chunks = [
            part["label"].fill_null(-1).to_numpy().astype(np.int32)
            for part in self.iter_parts(["label"])
        ]
        return np.concatenate([np.zeros(0, np.int32), *chunks])

    def groups(self) -> list[str]:
        """Leak group of each row."""
        parts = self.iter_parts(self.group_columns)
        return [name for part in parts for name in self.group_names(part)]

    @property
    def group_columns(self) -> tuple[str, str]:
        """The columns that `group_names` asks for."""
        # Keys of a joined table repeat where images differ. The digest of an image that is there
        # twice keeps both rows on one side of a split.
        return ("digest" if self.joined else "key", "group")

    def group_names(self, rows: pa.Table) -> list[str]:
        """Leak groups of some rows of this table; a row without one is a group of its own."""
        alone, groups = (rows[name].to_pylist() for name in self.group_columns)
        if self.joined:
            alone = [digest.hex() for digest in alone]
        pairs = zip(alone, groups, strict=True)
        return [name if group is None else group for name, group in pairs]

    def held_out(self, share: float, *, seed: int = 0) -> np.ndarray:
        """bool (num_rows,): True for about `share` of the groups, never for part of a group."""
        return np.asarray(
            [split_position(group, seed=seed) < share for group in self.groups()], dtype=bool
        )

    def check_parts(self) -> None:
        """Looks whether every part is there in its size: by listings, nothing is read.

        Raises:
            InputError: one is missing or cut short; names the first and how many there are.
        """
        sizes = {
            storage.join(folder, file.path): file.size
            for folder in [table["uri"] for table in self.joined] or [self.uri]
            for file in storage.list_files(folder, ".parquet", recursive=False)
        }
        count = len(self.parts)
        lost = [i for i in range(count) if sizes.get(self.part_uri(i)) != self.parts[i].bytes]
        if lost:
            part, found = self.parts[lost[0]], sizes.get(self.part_uri(lost[0]))
            what = "is missing" if found is None else f"has {found:,} of {part.bytes:,} bytes"
            again = "run the same `beit prepare` again, which makes all parts"
            if self.joined:
                again = "`beit join` the tables where they are now"
            raise InputError(
                f"{self.uri}: {part.uri or part.name} {what} ({len(lost)} of {count} parts are "
                f"not whole): bring the files back, or delete {MANIFEST} there and {again}"
            )

    def part_uri(self, position: int) -> str:
        """Address of one part's file."""
        part = self.parts[position]
        return part.uri or storage.join(self.uri, part.name)


class ImageTable(ImageParts):
    """An image table with the index of its row groups, the unit of the sample order."""

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        super().__init__(uri, {**manifest, "parts": list(manifest["parts"])})
        self.manifest = manifest
        self.row_groups = RowGroups([part.row_groups for part in self.parts])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self.manifest)

    def read_row_group(self, position: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Row group `position` of the table (not of its part), all columns or some."""
        group = self.row_groups[position]
        return read_row_groups(self.uri, self.parts[group.part], [group.index], columns)
