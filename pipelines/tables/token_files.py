"""The files of a token table: one for a contiguous row range of one image part.

Every file carries the identity of its table in its Parquet metadata; equal arguments give equal
bytes, so that a unit of work done twice does no harm.
"""

import functools
import json
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


def schema(identity: Identity) -> pa.Schema:
    """The Parquet schema, with the identity in its metadata."""
    length = identity.num_views * identity.num_patches
    stamp = json.dumps(identity.to_dict(), sort_keys=True).encode()
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("token_ids", pa.list_(pa.uint16(), length), nullable=False),
        ],
        metadata={STAMP: stamp},
    )


def encode_file(
    keys: Sequence[str] | pa.Array, token_ids: NDArray[np.uint16], identity: Identity
) -> bytes:
    """The bytes of one file. `token_ids` is (rows, V, N).

    The bytes depend on the arguments and on the version of pyarrow only. Tokens are split into
    byte planes and packed (zstd): Parquet has no 16-bit type and would spend 4 bytes on each.
    """
    rows = len(keys)
    expected = (rows, identity.num_views, identity.num_patches)
    if token_ids.shape != expected or token_ids.dtype != np.uint16:
        raise ValueError(f"token_ids: {token_ids.dtype} {token_ids.shape} is not uint16 {expected}")
    flat = pa.array(np.ascontiguousarray(token_ids).reshape(-1))
    length = identity.num_views * identity.num_patches
    table = pa.Table.from_arrays(
        [
            keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, length),
        ],
        schema=schema(identity),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        column_encoding={"key": "PLAIN", "token_ids.list.element": "BYTE_STREAM_SPLIT"},
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


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
) -> tuple[list[str], NDArray[np.uint16]]:
    """Keys and token ids (stop - start, V, N) of rows [start, stop), counted inside the file.

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
            return split_columns(as_written(table, schema(identity), stop - start), identity)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: missing, though the manifest lists it; tokenize again") from error


def split_columns(table: pa.Table, identity: Identity) -> tuple[list[str], NDArray[np.uint16]]:
    """Keys and token ids (rows, V, N) of a table in the schema of the token files."""
    ids = table.column("token_ids").combine_chunks()
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    flat = ids.flatten().to_numpy(zero_copy_only=True)
    shape = (table.num_rows, identity.num_views, identity.num_patches)
    return table.column("key").to_pylist(), flat.reshape(shape)


def check_file(identity: Identity, data: bytes, rows: int) -> tuple[bool, str | None]:
    """Whether `data` is a whole file of `rows` rows, and `field: found != wanted` if it belongs
    to a table of another identity."""
    try:
        with parsing("", ""):
            table = _table(data)
            difference = differing_field(_stamp(table.schema.metadata or {}), identity.to_dict())
    except DamagedFileError:
        return False, None
    return table.num_rows == rows and table.schema.equals(schema(identity)), difference


def read_file(uri: str) -> pa.Table:
    """All rows of a token file. Raises InputError if it is damaged."""
    data = storage.read_bytes(uri)
    with parsing(uri, REMEDY):
        return _table(data)


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), use_threads=False, page_checksum_verification=True)
