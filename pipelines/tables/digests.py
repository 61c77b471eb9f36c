"""The digests of whole tables, compared in bounded memory.

They are dealt out by their first bytes into buckets, files without a name on this disk (`TMPDIR`,
24 bytes a row), of which one at a time is read: equal digests are in the same bucket.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.tables.image_table import ImageParts

# Rows of a bucket, about: 100 MB, and as much again to sort them.
BUCKET_ROWS = 2**22
RECORD = np.dtype([("digest", "S16"), ("row", "<i8")])


def digest_records(images: ImageParts, first: int = 0) -> Iterator[NDArray[np.void]]:
    """Digest and row of every image, part by part; rows are counted from `first`.

    Raises:
        InputError: a part is missing or damaged.
    """
    for part in images.iter_parts(["digest"]):
        digests = pa.concat_arrays(part["digest"].chunks)
        raw = np.frombuffer(digests.buffers()[1], "S16")
        records = np.empty(len(digests), RECORD)
        records["digest"] = raw[digests.offset : digests.offset + len(digests)]
        records["row"] = np.arange(first, first + len(digests))
        first += len(digests)
        yield records


@contextmanager
def buckets(rows: int) -> Iterator[list[IO[bytes]]]:
    """Empty buckets for so many rows."""
    with ExitStack() as files:
        count = -(-rows // BUCKET_ROWS)
        yield [files.enter_context(tempfile.TemporaryFile()) for _ in range(count)]


def deal(chunks: Iterable[NDArray[np.void]], files: Sequence[IO[bytes]]) -> None:
    """Appends records to the buckets of their digests."""
    for records in chunks:
        # The first two bytes of a digest are an even draw of 65,536.
        raw = np.ascontiguousarray(records["digest"]).view(np.uint8).reshape(-1, 16)
        bucket = (raw[:, 0].astype(np.int64) * 256 + raw[:, 1]) * len(files) >> 16
        for number in np.unique(bucket).tolist():
            files[number].write(records[bucket == number].tobytes())


def read_bucket(file: IO[bytes]) -> NDArray[np.void]:
    """All records of a bucket, in the order in which they came."""
    file.seek(0)
    return np.frombuffer(file.read(), RECORD)


def num_repeated(images: ImageParts) -> int:
    """Rows whose image is in an earlier row, too. Raises as `digest_records`."""
    with buckets(images.num_rows) as files:
        deal(digest_records(images), files)
        return sum(len(some) - len(np.unique(some["digest"])) for some in map(read_bucket, files))
