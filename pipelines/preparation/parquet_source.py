"""A source of Parquet files: which columns hold what, and where its row groups lie."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation.labels import ClassNames
from pipelines.preparation.parquet_footers import Footer, holds_images, read_footers
from pipelines.preparation.readers import Reader
from pipelines.preparation.sources import MAX_CONTAINER_BYTES, Source, check_fetched
from pipelines.preparation.walking import Entry

DEFAULT_LABEL = "label"
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
        """Rows (and unreadable or ignored files) that `entries` passed so far."""
        label = "" if config.labels == "none" else config.label_field or DEFAULT_LABEL
        self.footers = read_footers(source.root, source.entries(), texts_of=label)
        self.seen: list[tuple[Entry, Footer | str]] = []
        for entry, footer in self.footers:
            self.seen.append((entry, footer))
            check_fetched(entry, source)
            if isinstance(footer, Footer):
                self.columns = _columns(config, source, entry, footer.schema)
                self.classes = ClassNames(self.columns["label_field"])
                return
        first = next((entry.path for entry, _ in self.seen if not entry.ignored), "none at all")
        raise InputError(
            f"source = {source.uri!r}: none of its files is readable Parquet ({first} is the "
            "first); write or fetch them again"
        )

    def with_columns(self, reader: Reader) -> Reader:
        """The reader, told where images, labels, keys and groups are, and what the classes are.

        Only when all `entries` have passed are all classes known.

        Raises:
            InputError: a column of labels was asked for or found, and there are none in it.
        """
        names = self.classes.names() if self.columns["label_field"] else ()
        return dataclasses.replace(reader, **self.columns, class_names=names)

    def entries(self) -> Iterator[Entry]:
        """Row groups in order; whole files where their rows are to be sorted by key.

        Raises:
            InputError: a file lacks a column, or is too large to be sorted.
        """
        for entry, footer in chain(self.seen, self.footers):
            if isinstance(footer, str):
                self.num_items += 1
                check_fetched(entry, self.source)
                yield entry if entry.ignored else dataclasses.replace(entry, reason=footer)
                continue
            self.num_items += sum(footer.rows)
            for field in ("image_field", "label_field", "group_field", "key_field"):
                if self.columns[field]:
                    _check_column(field, self.columns[field], entry, footer.schema)
            self._add_classes(entry, footer)
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

    def _add_classes(self, entry: Entry, footer: Footer) -> None:
        if self.columns["label_field"]:
            self.classes.add(entry.path, footer.schema, footer.texts)
        elif self.config.labels == "auto" and DEFAULT_LABEL in footer.schema.names:
            raise InputError(
                f"labels = 'auto': {entry.path} has a column {DEFAULT_LABEL!r}, other files have "
                "none; set labels = 'none', or choose files by a glob"
            )


def _check_column(field: str, name: str, entry: Entry, schema: pa.Schema) -> None:
    if name not in schema.names:
        raise InputError(
            f"{field} = {name!r}: {entry.path} has no such column "
            f"(it has {', '.join(schema.names)}); choose files by a glob"
        )
    if schema.names.count(name) > 1:
        raise InputError(
            f"{field} = {name!r}: {entry.path} has several columns of that name; rename all but one"
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


def _columns(
    config: PrepareConfig, source: Source, entry: Entry, schema: pa.Schema
) -> dict[str, Any]:
    """The reader's fields that concern columns."""
    for field in ("image_field", "label_field", "key_field", "group_field"):
        name = getattr(config, field)
        if name and name not in schema.names:
            raise InputError(
                f"{field} = {name!r}: no such column in {source.uri} "
                f"(it has {', '.join(schema.names)})"
            )
    image = config.image_field or _image_column(schema)
    _check_column("image_field", image, entry, schema)
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
    label = config.label_field or DEFAULT_LABEL
    if config.labels == "none" or (label not in schema.names and config.labels == "auto"):
        return columns
    if label not in schema.names:
        raise InputError(f"label_field = {label!r}: no such column in {source.uri}")
    _check_column("label_field", label, entry, schema)
    return {**columns, "labels": "field", "label_field": label}


def _image_column(schema: pa.Schema) -> str:
    found = [field.name for field in schema if holds_images(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if len(found) == 1 or named:
        return str((named or found)[0])
    raise InputError(
        f"image_field: columns of bytes are {found or 'none'} of {schema.names}; "
        + (
            "name the one with the images"
            if found
            else "write encoded images into one: paths, lists and base64 are not read"
        )
    )
