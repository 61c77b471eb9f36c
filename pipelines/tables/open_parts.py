"""Parquet files kept open by a process, for cheap random access by row group."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import DamagedFileError, parsing


class OpenPart:
    """A file and its parsed footer. Both may be shared by threads; a reader may not."""

    def __init__(
        self, uri: str, *, num_bytes: int, row_groups: tuple[int, ...], remedy: str
    ) -> None:
        """Opens the file and reads its footer (on an object store: a few requests).

        Raises:
            DamagedFileError: it has another size or other row groups than expected.
            FileNotFoundError: it is gone.
        """
        self.uri, self.num_bytes, self.remedy = uri, num_bytes, remedy
        with storage.open_input(uri) as file, parsing(uri, remedy):
            if file.size() != num_bytes:
                raise ValueError(f"{file.size()} bytes instead of {num_bytes}")
            self.metadata = pq.read_metadata(file)
            groups = range(self.metadata.num_row_groups)
            if tuple(self.metadata.row_group(i).num_rows for i in groups) != row_groups:
                raise ValueError("other row groups than its manifest lists")
        self.shared = storage.open_shared(uri)

    def read(self, indices: Sequence[int], columns: pa.Schema) -> pa.Table:
        """These columns of row groups `indices`; neighbouring columns come in one request.

        Raises:
            DamagedFileError: a page's checksum is wrong, or the page cannot be read.
        """
        if self.shared is not None:
            try:
                return self._read(self.shared, list(indices), columns)
            except (OSError, DamagedFileError):
                if storage.is_local(self.uri):
                    raise
        # What pyarrow's own reader could not have is asked for again, with more patience.
        with storage.open_input(self.uri, size=self.num_bytes) as file:
            return self._read(file, list(indices), columns)

    def _read(self, file: pa.NativeFile, indices: list[int], columns: pa.Schema) -> pa.Table:
        with parsing(self.uri, self.remedy):
            reader = pq.ParquetFile(
                file, metadata=self.metadata, pre_buffer=True, page_checksum_verification=True
            )
            table = reader.read_row_groups(indices, columns=columns.names, use_threads=False)
            rows = sum(self.metadata.row_group(index).num_rows for index in indices)
            return as_written(table.select(columns.names), columns, rows)


def as_written(table: pa.Table, columns: pa.Schema, rows: int) -> pa.Table:
    """The table with the schema it was written with.

    Checksums cover pages, and neither footers nor headers: a flipped bit there may make booleans
    of numbers.

    Raises:
        ValueError: it has other columns, types or rows, or text that is no UTF-8.
    """
    if (table.schema.names, table.schema.types) != (columns.names, columns.types):
        raise ValueError(f"columns {table.schema.to_string(show_schema_metadata=False)!r}")
    if table.num_rows != rows:
        raise ValueError(f"{table.num_rows} rows instead of {rows}")
    table = table.cast(columns)
    table.validate(full=True)
    return table


class OpenParts:
    """The files this process used last. Old entries are dropped, never closed under a reader."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.Lock()
        self.entries: OrderedDict[tuple[str, str], OpenPart] = OrderedDict()

    def get(
        self,
        uri: str,
        *,
        content_hash: str,
        num_bytes: int,
        row_groups: tuple[int, ...],
        remedy: str,
    ) -> OpenPart:
        """The open file at `uri`; raises as `OpenPart` does.

        The hash keeps a file written anew at the same place apart from the old one.
        """
        name = (uri, content_hash)
        with self.lock:
            if name in self.entries:
                self.entries.move_to_end(name)
                return self.entries[name]
        opened = OpenPart(uri, num_bytes=num_bytes, row_groups=row_groups, remedy=remedy)
        with self.lock:
            self.entries[name] = opened
            if len(self.entries) > self.capacity:
                self.entries.popitem(last=False)
        return opened
