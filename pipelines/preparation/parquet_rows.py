"""The rows of a Parquet file as the plan found it, streamed in small batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputError
from pipelines.preparation.walking import Entry

BATCH_ROWS = 32
STREAM_BYTES = 4 * 2**20


def batches(root: str, entry: Entry, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The entry's row groups in small pieces.

    Args:
        columns: The column with the images first.

    Raises:
        InputError: this is not the file that was listed.
    """
    uri = storage.join(root, entry.path)
    groups = list(range(entry.first, entry.stop))
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=STREAM_BYTES)
        _check_unchanged(file, entry, columns)
        chosen = [_stored_name(file.schema_arrow, name) for name in columns]
        yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=chosen)


def value(row: pa.RecordBatch, column: str) -> Any:
    """The value in a batch of one row.

    One by one, so that text that is no UTF-8 fails its own row only.

    Raises:
        UnicodeDecodeError: it is such text.
    """
    return stored(row.column(column))[0].as_py()


def stored(values: pa.Array) -> pa.Array:
    """The values below extension types and dictionaries."""
    while isinstance(values, pa.ExtensionArray | pa.DictionaryArray):
        extension = isinstance(values, pa.ExtensionArray)
        values = values.storage if extension else values.dictionary_decode()
    return values


def image_bytes(group: pq.RowGroupMetaData, image_field: str) -> int:
    """Bytes that the image column takes in a row group, with the columns inside it."""
    columns = [group.column(position) for position in range(group.num_columns)]
    return sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema == image_field
        or column.path_in_schema.startswith(image_field + ".")
    )


def _stored_name(schema: pa.Schema, column: str) -> str:
    """Of `datasets`' image structs only the bytes: the path beside them may be no UTF-8.

    Arrow reads extension types as a whole only.
    """
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def _check_unchanged(file: pq.ParquetFile, entry: Entry, columns: Sequence[str]) -> None:
    metadata = file.metadata
    groups = [
        metadata.row_group(position)
        for position in range(entry.first, min(entry.stop, metadata.num_row_groups))
    ]
    found = (
        len(groups),
        sum(group.num_rows for group in groups),
        sum(image_bytes(group, columns[0]) for group in groups),
    )
    listed = (entry.stop - entry.first, entry.rows, entry.size)
    if found != listed or not set(columns) <= set(file.schema_arrow.names):
        raise InputError(
            f"source: {entry.path} changed since it was listed; remove _work/ in the output and "
            "run again"
        )
