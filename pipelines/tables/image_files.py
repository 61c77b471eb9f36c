"""The files of an image table: parts, their rows, and how both are written and read.

Row groups are the unit of reading: 8 to 16 MB, one ranged request each, because the image column
is stored uncompressed and beside the small columns of the same rows.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from pipelines import storage
from pipelines.errors import InputError, parsing
from pipelines.records import Count, FileName, Hash
from pipelines.tables.open_parts import OpenParts
from pipelines.tables.row_groups import RowGroups

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

LABEL = IMAGE_SCHEMA.field("label")

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
    uri: str = ""
    """Address of the file, where it lies in the directory of another table (a joined table's)."""
    labels: tuple[int, ...] | None = None
    """The label that stands for each label in the file; None: the same."""

    def to_dict(self) -> dict[str, Any]:
        """A `PartRecord`: without the labels, which a table has once for all its parts."""
        record = {name: getattr(self, name) for name in PartRecord.__annotations__}
        if not self.uri:
            del record["uri"]
        return {**record, "row_groups": list(self.row_groups)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], labels: tuple[int, ...] | None = None) -> Self:
        """The part of a `PartRecord`. Raises ValueError if its row groups are not its rows."""
        if sum(record["row_groups"]) != record["rows"]:
            raise ValueError(f"{record['name']}: row_groups are not its {record['rows']} rows")
        known = {name: record[name] for name in PartRecord.__annotations__ if name in record}
        return cls(**{**known, "row_groups": tuple(known["row_groups"])}, labels=labels)


class PartRecord(TypedDict):
    """What must stand in a manifest for a part."""

    name: FileName
    rows: Count
    bytes: Count
    hash: Hash
    content: Hash
    row_groups: list[Count]
    uri: NotRequired[str]


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


def read_part(
    uri: str, part: Part, start: int, stop: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows [start, stop) of one part, counted inside it; reads the row groups that hold them.

    Raises:
        InputError: the part is missing or damaged.
    """
    groups = RowGroups([part.row_groups])
    positions = groups.overlapping(start, stop)
    if not positions:
        return schema_of(columns).empty_table()
    table = read_row_groups(uri, part, positions, columns)
    return table.slice(start - int(groups.starts[positions[0]]), stop - start)


def read_row_groups(
    uri: str, part: Part, indices: Sequence[int], columns: Sequence[str] | None = None
) -> pa.Table:
    """Some row groups of one part, all columns or some. Raises as `read_part`."""
    name = part.uri or storage.join(uri, part.name)
    of_part = part.uri.rpartition("/")[0] or uri
    try:
        opened = _OPEN.get(
            name,
            content_hash=part.hash,
            num_bytes=part.bytes,
            row_groups=part.row_groups,
            remedy=f"`beit audit` lists all damage, prepare the table {of_part} again",
        )
        table = opened.read(indices, schema_of(columns))
    except FileNotFoundError as error:
        again = "prepare the table again"
        if part.uri:
            again = f"delete the manifest of {uri} and `beit join` the tables where they are now"
        raise InputError(
            f"{name}: missing, though the manifest lists it; restore it or {again}"
        ) from error
    if part.labels is None or "label" not in table.column_names:
        return table
    with parsing(name, f"the manifest of {uri} has no label for it: `beit join` its tables again"):
        labels = pa.array(part.labels, pa.int32()).take(table["label"])
        return table.set_column(table.column_names.index("label"), LABEL, labels)


def schema_of(columns: Sequence[str] | None) -> pa.Schema:
    """The schema of these columns; of all for None."""
    names = IMAGE_SCHEMA.names if columns is None else columns
    return pa.schema([IMAGE_SCHEMA.field(name) for name in names])


_OPEN = OpenParts(OPEN_PARTS)
