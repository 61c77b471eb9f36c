"""A source of Parquet files: which columns hold what, and where its row groups lie."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation.readers import Reader, is_damage
from pipelines.preparation.sources import MAX_CONTAINER_BYTES, Entry, Source, mapped_ahead

THREADS = 16
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")


class ParquetPlan:
    """Reads the footers of a source's files, once and in order."""

    def __init__(self, config: PrepareConfig, source: Source) -> None:
        """Looks for the first readable file, whose schema decides.

        Raises:
            InputError: there is none, or the configuration names a column it lacks.
        """
        self.config, self.source = config, source
        self.num_items = 0
        """Rows (and unreadable files) that `entries` passed so far."""
        self.footers = mapped_ahead(
            lambda entry: (entry, _footer(source, entry)), source.entries(), num_threads=THREADS
        )
        self.seen: list[tuple[Entry, pq.FileMetaData | None]] = []
        for found in self.footers:
            self.seen.append(found)
            if found[1] is not None:
                self.columns = _columns(config, source, found[1].schema.to_arrow_schema())
                return
        raise InputError(f"source = {source.uri!r}: none of its files is readable Parquet")

    def with_columns(self, reader: Reader) -> Reader:
        """The reader, told where images, labels, keys and groups are."""
        return dataclasses.replace(reader, **self.columns)

    def entries(self) -> Iterator[Entry]:
        """Row groups in order; whole files where their rows are to be sorted by key.

        Raises:
            InputError: a file lacks a column, or is too large to be sorted.
        """
        for entry, metadata in chain(self.seen, self.footers):
            if metadata is None:
                self.num_items += 1
                yield dataclasses.replace(entry, reason="bad_parquet")
                continue
            self.num_items += metadata.num_rows
            self._check_columns(entry, metadata)
            if self.columns["key_field"]:
                yield _whole(self.source, entry, metadata)
            else:
                yield from _row_groups(entry, metadata, self.columns["image_field"])

    def _check_columns(self, entry: Entry, metadata: pq.FileMetaData) -> None:
        names = metadata.schema.to_arrow_schema().names
        for field in ("image_field", "label_field", "group_field", "key_field"):
            name = self.columns[field]
            if name and name not in names:
                raise InputError(
                    f"{field} = {name!r}: {entry.path} has no such column "
                    f"(it has {', '.join(names)}); choose files by a glob"
                )


def _footer(source: Source, entry: Entry) -> pq.FileMetaData | None:
    """None: the file is damaged."""
    uri = storage.join(source.root, entry.path)

    def read() -> pq.FileMetaData:
        with storage.open_input(uri) as file:
            return pq.read_metadata(file)

    try:
        return read() if storage.is_local(uri) else storage.retry(read)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error, uri):
            raise
        return None


def _row_groups(entry: Entry, metadata: pq.FileMetaData, image_field: str) -> Iterator[Entry]:
    row = 0
    for position in range(metadata.num_row_groups):
        group = metadata.row_group(position)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(
            column.total_compressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] == image_field
        )
        yield Entry(
            path=entry.path,
            size=size,
            first=position,
            stop=position + 1,
            row=row,
            rows=group.num_rows,
        )
        row += group.num_rows


def _whole(source: Source, entry: Entry, metadata: pq.FileMetaData) -> Entry:
    if entry.size > MAX_CONTAINER_BYTES:
        raise InputError(
            f"key_field: {entry.path} has {entry.size} bytes and must be sorted by its keys in "
            f"memory, where {MAX_CONTAINER_BYTES} are the limit; leave key_field empty (rows are "
            f"then named by number) or write smaller files to {source.root}"
        )
    return dataclasses.replace(entry, first=0, stop=metadata.num_row_groups, rows=metadata.num_rows)


def _columns(config: PrepareConfig, source: Source, schema: pa.Schema) -> dict[str, Any]:
    """The reader's fields that concern columns."""
    for field in ("image_field", "label_field", "key_field", "group_field"):
        name = getattr(config, field)
        if name and name not in schema.names:
            raise InputError(
                f"{field} = {name!r}: no such column in {source.uri} "
                f"(it has {', '.join(schema.names)})"
            )
    image = config.image_field or _image_column(schema)
    if not _holds_images(schema.field(image).type):
        raise InputError(
            f"image_field = {image!r}: is {schema.field(image).type}; give a column of bytes"
        )
    columns: dict[str, Any] = {
        "image_field": image,
        "key_field": config.key_field,
        "group_field": config.group_field,
        "label_field": "",
    }
    label = config.label_field or "label"
    if config.labels == "none" or (label not in schema.names and config.labels == "auto"):
        return columns
    if label not in schema.names:
        raise InputError(f"label_field = {label!r}: no such column in {source.uri}")
    names = _label_names(source, label, schema)
    return {**columns, "labels": "field", "label_field": label, "class_names": names}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(schema: pa.Schema) -> str:
    found = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if len(found) == 1 or named:
        return str((named or found)[0])
    raise InputError(
        f"image_field: columns of bytes are {found or 'none'} of {schema.names}; "
        "name the one with the images"
    )


def _label_names(source: Source, column: str, schema: pa.Schema) -> tuple[str, ...]:
    """Class names: from the file's own description, or the texts that occur; none for numbers.

    Raises:
        InputError: the column holds neither whole numbers nor text.
    """
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return _names_in_metadata(schema, column)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"label_field = {column!r}: is {kind}; give whole numbers or text")
    names: set[str] = set()
    for found in mapped_ahead(
        lambda entry: _distinct(source, entry, column), source.entries(), num_threads=THREADS
    ):
        names |= found
    return tuple(sorted(names))


def _names_in_metadata(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Class names that the `datasets` library left in the schema."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names: Sequence[str] = described["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()


def _distinct(source: Source, entry: Entry, column: str) -> set[str]:
    uri = storage.join(source.root, entry.path)

    def read() -> set[str]:
        with storage.open_input(uri) as file:
            values = pq.ParquetFile(file).read(columns=[column])[column]
            return {value for value in values.unique().to_pylist() if value is not None}

    try:
        return read() if storage.is_local(uri) else storage.retry(read)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error, uri):
            raise
        return set()  # the rows are rejected when their turn comes
