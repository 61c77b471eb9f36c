"""What an image table has that an older one lacks: told by the content of images, not by names."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.tables.image_table import ImageParts


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Rows of two tables, by the digests of their images."""

    older: str
    new: int
    """Rows whose image is in no row of the older table."""
    same: int
    gone: int
    """Rows of the older table whose image is in no row of this one."""

    def __str__(self) -> str:
        return (
            f"against {self.older}: {self.new:,} rows are new, {self.same:,} are of images that it "
            f"has, {self.gone:,} of its rows are gone"
        )


def difference(table: ImageParts, older: ImageParts) -> Difference:
    """Compares two tables; holds 16 bytes a row of both.

    Raises:
        InputError: a part is missing or damaged.
    """
    ours, theirs = _digests(table), _digests(older)
    same = _among(ours, theirs)
    return Difference(
        older=older.uri,
        new=len(ours) - same,
        same=same,
        gone=len(theirs) - _among(theirs, ours),
    )


def _digests(table: ImageParts) -> pa.ChunkedArray:
    chunks = [part["digest"].combine_chunks() for part in table.iter_parts(["digest"])]
    return pa.chunked_array(chunks, pa.binary(16))


def _among(some: pa.ChunkedArray, others: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.is_in(some, value_set=others)).as_py() or 0)
