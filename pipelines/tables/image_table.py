"""The image table: the one form in which every later stage meets images.

A directory of `part-*.parquet`, `rejected.parquet` and, written last, `manifest.json`. Rows are
sorted by `key` through all parts, so a row's position is its identity (row id). Row groups are
the unit of reading: 8 to 16 MB, one ranged request each, because the image column is stored
uncompressed and beside the small columns of the same rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputError
from pipelines.tables.open_parts import DamagedFileError, OpenParts
from pipelines.tables.row_groups import RowGroups

SCHEMA_VERSION = 1
KIND = "image_table"
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("digest", pa.binary(16), nullable=False),
        pa.field("group", pa.string()),
    ]
)
"""`group` names what must stay on one side of a train/held-out split; null means the row alone."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

ROW_GROUP_BYTES = 12 * 2**20
# A window of the sample order touches a handful of parts; this many stay open in a process.
OPEN_PARTS = 128


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One image as it goes into a part."""

    key: str
    image: bytes
    height: int
    width: int
    label: int | None
    digest: bytes
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of the table, as the manifest records it."""

    name: str
    rows: int
    bytes: int
    hash: str
    """Hash of the file."""
    content: str
    """Hash of the digests and labels of its rows, in order."""
    row_groups: tuple[int, ...]
    """Rows of each row group."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "row_groups": list(self.row_groups)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{**record, "row_groups": tuple(record["row_groups"])})


class PartWriter:
    """Builds one part in memory: row groups of about `row_group_bytes` of image bytes.

    The bytes depend on the rows and the version of pyarrow only: no time, no host, no order of
    arrival.
    """

    def __init__(self, *, row_group_bytes: int = ROW_GROUP_BYTES) -> None:
        self.row_group_bytes = row_group_bytes
        self.sink = pa.BufferOutputStream()
        self.writer = pq.ParquetWriter(
            self.sink,
            IMAGE_SCHEMA,
            version="2.6",
            use_dictionary=["label"],
            # Encoded images do not compress; trying costs time and prevents reading in place.
            compression={
                name: "NONE" if name in ("image", "digest") else "ZSTD"
                for name in IMAGE_SCHEMA.names
            },
            write_statistics=["key"],
            write_page_checksum=True,
        )
        self.content = hashlib.blake2b(digest_size=16)
        self.pending: list[ImageRow] = []
        self.pending_bytes = 0
        self.image_bytes = 0
        self.row_groups: list[int] = []
        self.last_key: str | None = None

    def add(self, row: ImageRow) -> None:
        """Appends a row. Raises ValueError if its key is not above the one before."""
        if self.last_key is not None and row.key <= self.last_key:
            raise ValueError(f"key {row.key!r} after {self.last_key!r}: keys must ascend")
        self.last_key = row.key
        self.pending.append(row)
        self.pending_bytes += len(row.image)
        self.image_bytes += len(row.image)
        if self.pending_bytes >= self.row_group_bytes:
            self._flush()

    def finish(self, name: str) -> tuple[pa.Buffer, Part]:
        """The file's bytes and its record."""
        self._flush()
        self.writer.close()
        data = self.sink.getvalue()
        return data, Part(
            name=name,
            rows=sum(self.row_groups),
            bytes=data.size,
            hash=storage.digest(data),
            content=self.content.hexdigest(),
            row_groups=tuple(self.row_groups),
        )

    def _flush(self) -> None:
        rows = self.pending
        if not rows:
            return
        columns = [
            pa.array([getattr(row, field.name) for row in rows], field.type)
            for field in IMAGE_SCHEMA
        ]
        table = pa.Table.from_arrays(columns, schema=IMAGE_SCHEMA)
        self.writer.write_table(table, row_group_size=len(rows))
        self.content.update(content_bytes(table))
        self.row_groups.append(len(rows))
        self.pending, self.pending_bytes = [], 0


def content_bytes(table: pa.Table) -> bytes:
    """What the fingerprint covers of some rows: 16 bytes digest, 4 bytes label (-1 = null) each."""
    record = np.empty(table.num_rows, dtype=[("digest", np.uint8, 16), ("label", "<i4")])
    digests = b"".join(table["digest"].to_pylist())
    record["digest"] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
    record["label"] = table["label"].fill_null(-1).to_numpy()
    return record.tobytes()


def write_part(
    uri: str, name: str, rows: Iterable[ImageRow], *, row_group_bytes: int = ROW_GROUP_BYTES
) -> Part:
    """Writes rows (keys ascending) as one part of the table at `uri`, atomically."""
    writer = PartWriter(row_group_bytes=row_group_bytes)
    for row in rows:
        writer.add(row)
    data, part = writer.finish(name)
    storage.write_bytes(storage.join(uri, name), data)
    return part


def commit_manifest(
    uri: str,
    *,
    parts: Sequence[Part],
    class_names: Sequence[str],
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    rejected: Mapping[str, int],
    num_items: int,
) -> dict[str, Any]:
    """Writes `manifest.json`, which makes the table exist, and returns it.

    Args:
        parts: In row order.
        rejected: Number of rejected items by reason (they are listed in `rejected.parquet`).
        num_items: Items the source held: rows + rejected.
    """
    manifest = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": table_fingerprint(parts, class_names),
        "num_rows": sum(part.rows for part in parts),
        "num_items": num_items,
        "bytes": sum(part.bytes for part in parts),
        "class_names": list(class_names),
        "source": dict(source),
        "options": dict(options),
        "parts": [part.to_dict() for part in parts],
        "rejected": dict(rejected),
        "pyarrow": pa.__version__,
    }
    storage.write_json(storage.join(uri, MANIFEST), manifest)
    return manifest


def table_fingerprint(parts: Sequence[Part], class_names: Sequence[str]) -> str:
    """Identity of a table's contents: its digests and labels in order, cut into parts as it is.

    Token tables name rows by part and position, so the cut belongs to the identity; keys,
    encodings of the files and where the table lies do not.
    """
    return storage.fingerprint(
        {
            "schema_version": SCHEMA_VERSION,
            "parts": [[part.rows, part.content] for part in parts],
            "class_names": list(class_names),
        }
    )


def split_position(group: str, *, seed: int = 0) -> float:
    """Where a leak group stands in [0, 1): a hash, the same in every table and on every machine."""
    raw = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little") / 2**64


class ImageTable:
    """A finished image table at a URI; safe to read from many threads."""

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self.class_names: list[str] = manifest["class_names"]
        self.parts = [Part.from_dict(record) for record in manifest["parts"]]
        self.row_groups = RowGroups([part.row_groups for part in self.parts])

    @classmethod
    def open(cls, uri: str) -> Self:
        """Reads the manifest.

        Raises:
            InputError: there is no finished table at `uri`, or its version is not ours.
        """
        uri = storage.absolute(uri)
        try:
            manifest = storage.read_json(storage.join(uri, MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{uri}: no finished image table ({MANIFEST} is missing); "
                "run `beit prepare` with this output, again if it was interrupted"
            ) from error
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            kind = manifest.get("kind") if isinstance(manifest, dict) else None
            raise InputError(f"{uri}: kind is {kind!r}, not {KIND!r}; give an image table")
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{uri}: schema_version {manifest['schema_version']}, this program reads "
                f"{SCHEMA_VERSION}; prepare the table again"
            )
        table = cls(uri, manifest)
        expected = table_fingerprint(table.parts, table.class_names)
        if expected != table.fingerprint:
            raise InputError(
                f"{uri}: fingerprint {table.fingerprint} does not belong to the parts listed in "
                f"{MANIFEST} ({expected}); the manifest was edited, prepare the table again"
            )
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self.manifest)

    def read_row_group(self, position: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Row group `position` of the table (not of its part), all columns or some."""
        group = self.row_groups[position]
        return self._read(group.part, [group.index], columns)

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows [start, stop) in order; reads the row groups that hold them.

        Raises:
            IndexError: outside the table.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) of a table of {self.num_rows} rows")
        positions = self.row_groups.overlapping(start, stop)
        if not positions:
            return _select(IMAGE_SCHEMA, columns).empty_table()
        table = pa.concat_tables(self.read_row_group(i, columns) for i in positions)
        return table.slice(start - int(self.row_groups.starts[positions[0]]), stop - start)

    def iter_parts(
        self, columns: Sequence[str] | None = None, *, num_threads: int = 8
    ) -> Iterator[pa.Table]:
        """Every part in order, a few read ahead; for small columns."""
        with ThreadPoolExecutor(num_threads) as pool:
            step = 2 * num_threads
            for first in range(0, len(self.parts), step):
                chunk = range(first, min(first + step, len(self.parts)))
                yield from pool.map(
                    lambda i: self._read(i, range(len(self.parts[i].row_groups)), columns), chunk
                )

    def labels(self) -> np.ndarray:
        """int32 (num_rows,): class of each row, -1 where it has none."""
        chunks = [
            part["label"].fill_null(-1).to_numpy().astype(np.int32)
            for part in self.iter_parts(["label"])
        ]
        return np.concatenate([np.zeros(0, np.int32), *chunks])

    def groups(self) -> list[str]:
        """Leak group of each row; a row without one is a group of its own, named by its key."""
        names: list[str] = []
        for part in self.iter_parts(["key", "group"]):
            rows = zip(part["key"].to_pylist(), part["group"].to_pylist(), strict=True)
            names.extend(key if group is None else group for key, group in rows)
        return names

    def held_out(self, share: float, *, seed: int = 0) -> np.ndarray:
        """bool (num_rows,): True for about `share` of the groups, never for part of a group."""
        return np.asarray(
            [split_position(group, seed=seed) < share for group in self.groups()], dtype=bool
        )

    def part_uri(self, position: int) -> str:
        """Address of one part's file."""
        return storage.join(self.uri, self.parts[position].name)

    def _read(
        self, position: int, indices: Iterable[int], columns: Sequence[str] | None
    ) -> pa.Table:
        part = self.parts[position]
        wanted = _select(IMAGE_SCHEMA, columns)
        try:
            opened = _OPEN.get(
                self.part_uri(position),
                content_hash=part.hash,
                num_bytes=part.bytes,
                row_groups=part.row_groups,
            )
            return opened.read(list(indices), wanted.names).cast(wanted)
        except FileNotFoundError as error:
            raise InputError(
                f"{self.part_uri(position)}: missing, though {MANIFEST} lists it; "
                "restore it or prepare the table again"
            ) from error
        except DamagedFileError as error:
            raise InputError(
                f"{self.part_uri(position)}: damaged ({error}); "
                "`beit audit` lists all damage, prepare the table again"
            ) from error


def _select(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


_OPEN = OpenParts(OPEN_PARTS)
