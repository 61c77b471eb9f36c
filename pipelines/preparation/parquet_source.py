"""A source of Parquet files: which columns hold what, and where its row groups lie."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation.parquet_footers import Footer, holds_images, read_footers
from pipelines.preparation.readers import Reader
from pipelines.preparation.sources import MAX_CLASSES, MAX_CONTAINER_BYTES, Source
from pipelines.preparation.walking import Entry

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
        self.footers = read_footers(source.root, source.entries())
        self.seen: list[tuple[Entry, Footer | str]] = []
        for entry, footer in self.footers:
            self.seen.append((entry, footer))
            if isinstance(footer, Footer):
                self.columns = _columns(config, source, footer.schema)
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
        for entry, footer in chain(self.seen, self.footers):
            if isinstance(footer, str):
                self.num_items += 1
                yield dataclasses.replace(entry, reason=footer)
                continue
            self.num_items += sum(footer.rows)
            for field in ("image_field", "label_field", "group_field", "key_field"):
                if self.columns[field]:
                    _check_column(field, self.columns[field], entry, footer.schema)
            sizes = footer.image_bytes.get(self.columns["image_field"])
            if sizes is None:
                raise InputError(
                    f"image_field = {self.columns['image_field']!r}: holds no bytes in "
                    f"{entry.path}; choose files by a glob"
                )
            if self.columns["key_field"]:
                yield _whole(self.source, entry, footer, sizes)
            else:
                yield from _row_groups(entry, footer, sizes)


def _check_column(field: str, name: str, entry: Entry, schema: pa.Schema) -> None:
    if name not in schema.names:
        raise InputError(
            f"{field} = {name!r}: {entry.path} has no such column "
            f"(it has {', '.join(schema.names)}); choose files by a glob"
        )


def _row_groups(entry: Entry, footer: Footer, sizes: Sequence[int]) -> Iterator[Entry]:
    row = 0
    for position, (rows, size) in enumerate(zip(footer.rows, sizes, strict=True)):
        yield Entry(
            path=entry.path, size=size, first=position, stop=position + 1, row=row, rows=rows
        )
        row += rows


def _whole(source: Source, entry: Entry, footer: Footer, sizes: Sequence[int]) -> Entry:
    if entry.size > MAX_CONTAINER_BYTES:
        raise InputError(
            f"key_field: {entry.path} has {entry.size} bytes and must be sorted by its keys in "
            f"memory, where {MAX_CONTAINER_BYTES} are the limit; leave key_field empty (rows are "
            f"then named by number) or write smaller files to {source.root}"
        )
    return Entry(path=entry.path, size=sum(sizes), stop=len(footer.rows), rows=sum(footer.rows))


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
    if not holds_images(schema.field(image).type):
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


def _image_column(schema: pa.Schema) -> str:
    found = [field.name for field in schema if holds_images(field.type)]
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
        InputError: the column holds neither whole numbers nor text, or too many different texts.
    """
    kind, types = schema.field(column).type, pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind) or types.is_boolean(kind):
        return _names_in_metadata(schema, column)
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise InputError(
            f"label_field = {column!r}: is {kind}; name a column of whole numbers or text, or set "
            "labels = 'none'"
        )
    names: set[str] = set()
    for entry, footer in read_footers(source.root, source.entries(), texts_of=column):
        if isinstance(footer, Footer):
            _check_column("label_field", column, entry, footer.schema)
            names.update(footer.texts)
        if len(names) > MAX_CLASSES:
            raise InputError(
                f"label_field = {column!r}: more than {MAX_CLASSES} different texts are no "
                "classes; name another column, or set labels = 'none'"
            )
    return tuple(sorted(names))


def _names_in_metadata(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Class names that the `datasets` library left in the schema."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names: Sequence[str] = described["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()
