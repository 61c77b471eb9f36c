"""The files of a token table: one for a contiguous row range of one image part.

Every file carries the identity of its table in its Parquet metadata; equal arguments give equal
bytes, so that a unit of work done twice does no harm.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typing_extensions import TypedDict

from beit.views import ViewPolicy
from pipelines import storage
from pipelines.errors import DamagedFileError, InputError, parsing
from pipelines.records import Count, Pair
from pipelines.tables.open_parts import as_written
from pipelines.tables.unit_files import differing_field

# Rows of one Parquet row group: a reader of a short run fetches little more than it needs.
ROW_GROUP_ROWS = 256
STAMP = b"beit.token_table"
LEVELS = "grey_levels"
# In the place of grey levels that a file does not have.
UNKNOWN_LEVEL = np.int16(-1)
REMEDY = "`beit audit` lists all damage, tokenize again"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything the tokens depend on. Two tables of equal identity hold equal tokens."""

    image_fingerprint: str
    num_rows: int
    """Rows of the image table."""
    tokenizer_fingerprint: str
    vocab_size: int
    grid_size: tuple[int, int]
    image_size: int
    """Side of the tokenizer's view in pixels."""
    interpolation: str
    """Filter that renders the tokenizer's view."""
    policy: dict[str, Any]
    """`ViewPolicy.to_dict()`, with its seed and version."""
    views: tuple[int, int]
    """First view and the one after the last."""
    device: str
    """cpu or cuda: where the arithmetic was done."""
    precision: str
    batch_size: int
    """Views in one call of the encoder; every call has exactly this many."""

    @property
    def num_views(self) -> int:
        return self.views[1] - self.views[0]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; equal identities give equal dicts."""
        return asdict(self) | {"grid_size": list(self.grid_size), "views": list(self.views)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Identity":
        """The inverse of `to_dict`; further keys are ignored. Raises KeyError by name."""
        values = completed(values)
        picked = {field.name: values[field.name] for field in fields(cls)}
        return cls(
            **picked | {"grid_size": tuple(picked["grid_size"]), "views": tuple(picked["views"])}
        )


class IdentityRecord(TypedDict):
    """What must stand in a record for an identity; what it lacks had its default then."""

    image_fingerprint: str
    num_rows: Count
    tokenizer_fingerprint: str
    vocab_size: Count
    grid_size: Pair
    image_size: Count
    interpolation: str
    policy: dict[str, int | float]
    views: Pair
    device: str
    precision: str
    batch_size: Count


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded identity, perhaps of an earlier version, with the fields that came since.

    The default of such a field, here or in `ViewPolicy`, is what was done before it existed.
    """
    since = {
        field.name: field.default for field in fields(Identity) if field.default is not MISSING
    }
    policy = ViewPolicy().to_dict() | record.get("policy", {})
    return since | record | {"policy": policy}


def schema(identity: Identity, *, levels: bool = False) -> pa.Schema:
    """The Parquet schema, with the identity in its metadata; old files have no grey `levels`."""
    length = identity.num_views * identity.num_patches
    stamp = json.dumps(identity.to_dict(), sort_keys=True).encode()
    columns = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.uint16(), length), nullable=False),
    ]
    if levels:
        columns.append(pa.field(LEVELS, pa.list_(pa.uint8(), identity.num_views), nullable=False))
    return pa.schema(columns, metadata={STAMP: stamp})


def encode_file(
    keys: Sequence[str] | pa.Array,
    token_ids: NDArray[np.uint16],
    identity: Identity,
    grey_levels: NDArray[np.uint8] | None = None,
) -> bytes:
    """The bytes of one file. `token_ids` is (rows, V, N), `grey_levels` of the views (rows, V).

    The bytes depend on the arguments and on the version of pyarrow only. Tokens are split into
    byte planes and packed (zstd): Parquet has no 16-bit type and would spend 4 bytes on each.
    """
    rows = len(keys)
    expected = (rows, identity.num_views, identity.num_patches)
    if token_ids.shape != expected or token_ids.dtype != np.uint16:
        raise ValueError(f"token_ids: {token_ids.dtype} {token_ids.shape} is not uint16 {expected}")
    columns = [
        keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string()),
        *(_lists(values) for values in (token_ids, grey_levels) if values is not None),
    ]
    written = schema(identity, levels=grey_levels is not None)
    table = pa.Table.from_arrays(columns, schema=written)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        column_encoding={"key": "PLAIN"}
        | {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in written.names[1:]},
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """(rows, …) as a list for each row."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))


@functools.lru_cache(maxsize=4096)
def _footer(uri: str, content_hash: str) -> pq.FileMetaData:
    # The hash keeps a file made anew at the same place apart from the old one.
    del content_hash
    try:
        with storage.open_input(uri) as file, parsing(uri, REMEDY):
            return pq.read_metadata(file)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: missing, though the manifest lists it; tokenize again") from error


def read_stamp(uri: str, content_hash: str) -> dict[str, Any]:
    """The identity stored in a token file.

    Raises:
        InputError: the file is missing or is no token file.
    """
    footer = _footer(uri, content_hash)
    with parsing(uri, "not a file of a token table"):
        return _stamp(footer.metadata or {})


def _stamp(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    return completed(dict(json.loads(metadata[STAMP])))


def read_rows(
    uri: str, identity: Identity, start: int, stop: int, *, content_hash: str
) -> tuple[list[str], NDArray[np.uint16], NDArray[np.int16]]:
    """Keys, token ids (stop - start, V, N) and grey levels of rows [start, stop), counted inside
    the file; `UNKNOWN_LEVEL` where it has none.

    Raises:
        InputError: the file is missing or damaged.
    """
    metadata = _footer(uri, content_hash)
    first_group, last_group = start // ROW_GROUP_ROWS, (stop - 1) // ROW_GROUP_ROWS
    skipped = start - first_group * ROW_GROUP_ROWS
    try:
        with storage.open_input(uri) as file, parsing(uri, REMEDY):
            reader = pq.ParquetFile(
                file, metadata=metadata, pre_buffer=True, page_checksum_verification=True
            )
            groups = list(range(first_group, last_group + 1))
            table = reader.read_row_groups(groups, use_threads=False)
            table = table.slice(skipped, stop - start)
            columns = schema(identity, levels=LEVELS in table.column_names)
            table = as_written(table, columns, stop - start)
            return *split_columns(table, identity), levels_of(table, identity)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: missing, though the manifest lists it; tokenize again") from error


def split_columns(table: pa.Table, identity: Identity) -> tuple[list[str], NDArray[np.uint16]]:
    """Keys and token ids (rows, V, N) of a table in the schema of the token files."""
    shape = (table.num_rows, identity.num_views, identity.num_patches)
    return table.column("key").to_pylist(), _flat(table.column("token_ids")).reshape(shape)


def levels_of(table: pa.Table, identity: Identity) -> NDArray[np.int16]:
    """Grey levels (rows, V) of such a table, `UNKNOWN_LEVEL` where it has none."""
    shape = (table.num_rows, identity.num_views)
    if LEVELS not in table.column_names:
        return np.full(shape, UNKNOWN_LEVEL)
    return _flat(table.column(LEVELS)).reshape(shape).astype(np.int16)


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    """The numbers of all lists, one after the other."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    flat: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=True)
    return flat


def check_file(identity: Identity, data: bytes, rows: int) -> tuple[bool, str | None]:
    """Whether `data` is a whole file of `rows` rows, and `field: found != wanted` if it belongs
    to a table of another identity."""
    try:
        with parsing("", ""):
            table = _table(data)
            difference = differing_field(_stamp(table.schema.metadata or {}), identity.to_dict())
    except DamagedFileError:
        return False, None
    columns = schema(identity, levels=LEVELS in table.column_names)
    return table.num_rows == rows and table.schema.equals(columns), difference


def read_file(uri: str) -> pa.Table:
    """All rows of a token file. Raises InputError if it is damaged."""
    data = storage.read_bytes(uri)
    with parsing(uri, REMEDY):
        return _table(data)


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), use_threads=False, page_checksum_verification=True)
