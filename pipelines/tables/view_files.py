"""The files of a view table: stored pixels of the views of one contiguous row range.

Columns: `key`, `digest`, and a *slot* for each of V views. Slot c holds the view that `view_of`
shows of each image in epoch c, so it mixes all views, and epoch e reads slot e mod V and nothing
else. Row groups are those of the image table, cut where they are long: a run of the sample order
is read without what lies beside it.
"""

import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from typing_extensions import TypedDict

from beit.images import UnusableImage, decode_array
from beit.view_policy import ViewPolicy
from pipelines.errors import DamagedFileError, InputError, parsing
from pipelines.records import Count, Pair
from pipelines.tables.unit_files import differing_field

Form = Literal["lossless", "jpeg95", "jpeg90"]
CODECS: dict[str, str] = {
    "lossless": "zstd of uint8 (3, side, side)",
    "jpeg95": "JPEG quality 95, 4:4:4",
    "jpeg90": "JPEG quality 90, 4:2:0",
}
"""What each form is. Raised to another text whenever readers must tell two apart."""
# Quality, and Pillow's number of the subsampling.
JPEG = {"jpeg95": (95, 0), "jpeg90": (90, 2)}
# Decoding takes the same time for all levels; 3 is 7 % smaller than 1, and 6 no smaller.
ZSTD_LEVEL = 3
# Rows of one row group at most, of tables that are made now: a ranged request of 6 MB of lossless
# views of 224 pixels, 1.5 MB of JPEGs. Windows of the sample order share row groups at their edges,
# which are read twice.
ROW_GROUP_ROWS = 64
STAMP = b"beit.view_table"


@dataclass(frozen=True, kw_only=True)
class ViewIdentity:
    """Everything the pixels and their places depend on: if equal, so are these."""

    image_fingerprint: str
    num_rows: int
    """Rows of the image table."""
    policy: dict[str, Any]
    """`ViewPolicy.to_dict()`, with its seed and version."""
    views: tuple[int, int]
    """First view and the one after the last."""
    image_size: int
    """Side of a view in pixels."""
    interpolation: str
    form: str
    codec: str
    row_group_rows: int
    """Row groups of the image table are cut into pieces of at most so many rows."""

    @property
    def num_views(self) -> int:
        return self.views[1] - self.views[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; equal identities give equal dicts."""
        return asdict(self) | {"views": list(self.views)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ViewIdentity":
        """The inverse of `to_dict`; further keys are ignored. Raises KeyError by name."""
        values = completed(values)
        picked = {field.name: values[field.name] for field in fields(cls)}
        return cls(**picked | {"views": tuple(picked["views"])})


class _OfThread(threading.local):
    """A codec is not promised to serve several threads; to make one takes as long as a use."""

    def __init__(self) -> None:
        self.zstd = pa.Codec("zstd", ZSTD_LEVEL)


_OWN = _OfThread()


class ViewIdentityRecord(TypedDict):
    """What must stand in a record for an identity."""

    image_fingerprint: str
    num_rows: Count
    policy: dict[str, int | float]
    views: Pair
    image_size: Count
    interpolation: str
    form: str
    codec: str
    row_group_rows: Count


def encode_view(pixels: np.ndarray, form: str) -> bytes:
    """A view uint8 (side, side, 3) as it is stored."""
    if form == "lossless":
        data: bytes = _OWN.zstd.compress(pixels.transpose(2, 0, 1).tobytes(), asbytes=True)
        return data
    quality, subsampling = JPEG[form]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def decode_view(data: bytes, form: str, side: int, *, key: str) -> np.ndarray:
    """The pixels of a stored view, uint8 (3, side, side). Raises InputError if it is damaged."""
    try:
        if form == "lossless":
            raw = _OWN.zstd.decompress(data, decompressed_size=3 * side**2)
            pixels = np.frombuffer(raw, np.uint8).reshape(3, side, side)
        else:
            pixels = decode_array(data).transpose(2, 0, 1)
    except (UnusableImage, ValueError, OSError) as error:
        raise _damaged(key, form, side, str(error)) from error
    if pixels.shape != (3, side, side):
        raise _damaged(key, form, side, f"{pixels.shape[2]}x{pixels.shape[1]} pixels")
    return pixels


def _damaged(key: str, form: str, side: int, why: str) -> InputError:
    return InputError(
        f"the stored view of image {key!r} does not decode as {CODECS[form]} of {side} pixels "
        f"({why}): the view table is damaged; run `beit audit`, then render it again"
    )


def slot_name(slot: int) -> str:
    return f"slot_{slot}"


def schema(identity: ViewIdentity) -> pa.Schema:
    """The Parquet schema, with the identity in its metadata."""
    slots = [pa.field(slot_name(i), pa.binary(), nullable=False) for i in range(identity.num_views)]
    stamp = json.dumps(identity.to_dict(), sort_keys=True).encode()
    return pa.schema([*KEYS, *slots], metadata={STAMP: stamp})


KEYS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),
    ]
)


def cut_row_groups(sizes: Sequence[int], most: int) -> list[int]:
    """Row groups of a part in pieces of at most `most` rows, as even as can be."""
    cut: list[int] = []
    for rows in sizes:
        pieces = -(-rows // most)
        cut += [(i + 1) * rows // pieces - i * rows // pieces for i in range(pieces)]
    return cut


def encode_file(rows: pa.Table, row_groups: Sequence[int], identity: ViewIdentity) -> pa.Buffer:
    """The bytes of one file of rows in the schema above, cut into these row groups.

    They depend on the arguments and on the version of pyarrow only.
    """
    sink, written = pa.BufferOutputStream(), schema(identity)
    with pq.ParquetWriter(
        sink,
        written,
        version="2.6",
        use_dictionary=False,
        # Views are compressed one by one, so that they stay so until a batch needs them.
        compression={n: "ZSTD" if n == "key" else "NONE" for n in written.names},
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        start = 0
        for count in row_groups:
            writer.write_table(rows.slice(start, count), row_group_size=count)
            start += count
    if start != rows.num_rows:
        raise ValueError(f"row groups of {start} rows for {rows.num_rows}")
    return sink.getvalue()


def check_file(
    identity: ViewIdentity, data: bytes, row_groups: Sequence[int]
) -> tuple[bool, str | None]:
    """Whether `data` is a whole file of these row groups, and `field: found != wanted` if it
    belongs to a table of another identity."""
    try:
        with parsing("", ""):
            footer = pq.read_metadata(pa.BufferReader(data))
            found = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            table = pq.read_table(
                pa.BufferReader(data), use_threads=False, page_checksum_verification=True
            )
            difference = differing_field(stamp_of(table.schema.metadata), identity.to_dict())
    except DamagedFileError:
        return False, None
    whole = found == list(row_groups) and table.num_rows == sum(found)
    return whole and table.schema.equals(schema(identity)), difference


def stamp_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The identity in a file's metadata."""
    return completed(json.loads((metadata or {})[STAMP]))


def completed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded identity; fields that `ViewPolicy` got since have their defaults."""
    return {**record, "policy": ViewPolicy().to_dict() | record["policy"]}
