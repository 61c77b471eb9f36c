"""Parquet files kept open by a process, for cheap random access by row group."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage


class DamagedFileError(Exception):
    """A file's bytes are not what was written; the message says in what."""


def is_damage(error: Exception) -> bool:
    """Whether an error of pyarrow is about a file's bytes, and not about reaching them."""
    marks = ("CRC checksum", "deserialize")
    return isinstance(error, pa.ArrowInvalid) or any(mark in str(error) for mark in marks)


class OpenPart:
    """A file and its parsed footer. Both may be shared by threads; a reader may not."""

    def __init__(self, uri: str, *, num_bytes: int, row_groups: tuple[int, ...]) -> None:
        """Opens the file and reads its footer (on an object store: a few requests).

        Raises:
            DamagedFileError: it has another size or other row groups than expected.
            FileNotFoundError: it is gone.
        """
        self.uri = uri
        self.num_bytes = num_bytes
        with storage.open_input(uri) as file:
            if file.size() != num_bytes:
                raise DamagedFileError(f"{file.size()} bytes instead of {num_bytes}")
            try:
                self.metadata = pq.read_metadata(file)
            except (pa.ArrowInvalid, OSError) as error:
                if not is_damage(error):
                    raise
                raise DamagedFileError(str(error)) from error
        self.shared = storage.open_shared(uri)
        rows = [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]
        if tuple(rows) != row_groups:
            raise DamagedFileError("other row groups than its manifest lists")

    def read(self, indices: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Columns `names` of row groups `indices`; neighbouring columns come in one request.

        Raises:
            DamagedFileError: a page's checksum is wrong, or the page cannot be read.
        """
        if self.shared is not None:
            try:
                return self._read(self.shared, list(indices), list(names))
            except (OSError, DamagedFileError):
                if storage.is_local(self.uri):
                    raise
        # What pyarrow's own reader could not have is asked for again, with more patience.
        with storage.open_input(self.uri, size=self.num_bytes) as file:
            return self._read(file, list(indices), list(names))

    def _read(self, file: pa.NativeFile, indices: list[int], names: list[str]) -> pa.Table:
        try:
            reader = pq.ParquetFile(
                file, metadata=self.metadata, pre_buffer=True, page_checksum_verification=True
            )
            return reader.read_row_groups(indices, columns=names, use_threads=False).select(names)
        except (pa.ArrowInvalid, OSError) as error:
            if not is_damage(error):
                raise
            raise DamagedFileError(str(error)) from error


class OpenParts:
    """The files this process used last. Old entries are dropped, never closed under a reader."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.Lock()
        self.entries: OrderedDict[tuple[str, str], OpenPart] = OrderedDict()

    def get(
        self, uri: str, *, content_hash: str, num_bytes: int, row_groups: tuple[int, ...]
    ) -> OpenPart:
        """The open file at `uri`; raises as `OpenPart` does.

        The hash keeps a file written anew at the same place apart from the old one.
        """
        name = (uri, content_hash)
        with self.lock:
            if name in self.entries:
                self.entries.move_to_end(name)
                return self.entries[name]
        opened = OpenPart(uri, num_bytes=num_bytes, row_groups=row_groups)
        with self.lock:
            self.entries[name] = opened
            if len(self.entries) > self.capacity:
                self.entries.popitem(last=False)
        return opened
