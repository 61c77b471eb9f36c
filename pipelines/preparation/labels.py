"""Labels as sources write them, and the classes that they name.

A label is right or it is refused: names are compared as names, numbers are whole or no labels, and
what could be read in two ways is not read.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import pyarrow as pa

from pipelines.errors import InputError
from pipelines.tables.class_names import comparable

# What tells more classes apart than this is free text, or numbers that mean something else.
MAX_CLASSES = 1_000_000
Kind = Literal["number", "text", "none"]
_NUMBER = re.compile(rb"[+-]?[0-9]+(\.0*)?")


def whole_number(value: object) -> int | None:
    """The class number that a value stands for; None: no label (null, not-a-number, negative).

    Raises:
        ValueError: it is no whole number, or too large for one of a class.
    """
    if value is None or value != value:  # noqa: PLR0124 - not-a-number differs from itself
        return None
    # Infinity is above the limit, too.
    if not isinstance(value, int | float | Decimal) or value >= MAX_CLASSES:
        raise ValueError(value)
    if value < 0:
        return None
    if value != int(value):
        raise ValueError(value)
    return int(value)


def member_value(data: bytes, field: str) -> Any:
    """The label in a tar's member: a number as text, or `field` of a JSON object.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: there is none.
    """
    if field:
        return json.loads(data, object_pairs_hook=_once)[field]
    text = data.removeprefix(b"\xef\xbb\xbf").strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError(text[:100])
    return int(text.partition(b".")[0])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def folder_class(path: str, level: int) -> str | None:
    """The class of a file: the folder `level` steps below the source (1: the first), if any."""
    folders = path.split("/")[:-1]
    return comparable(folders[level - 1]) if len(folders) >= level else None


def stored_type(kind: pa.DataType) -> pa.DataType:
    """The type that values have, below extension types and dictionaries."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def kind_of(kind: pa.DataType) -> Kind | None:
    """What labels a column of this type holds; None: it can hold none."""
    kind, types = stored_type(kind), pa.types
    if types.is_null(kind):
        return "none"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    numeric = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)
    return "number" if numeric or types.is_decimal(kind) else None


def described_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Class names by number, as the `datasets` library leaves them in a schema; () if it did not.

    Raises:
        InputError: a name stands there twice.
    """
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][column]["names"]
        if isinstance(names, Mapping):  # an older form: {"0": "cat", "1": "dog"}
            names = [names[str(number)] for number in range(len(names))]
        if not isinstance(names, list):
            return ()
    except (KeyError, TypeError, ValueError):
        return ()
    found = tuple(comparable(str(name)) for name in names)
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise InputError(
            f"label_field = {column!r}: two classes are called {twice!r}; rename one in the "
            "description of the column, or set labels = 'none'"
        )
    return found


class ClassNames:
    """The classes of all Parquet files of a source, brought together by name."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.described: dict[str, None] = {}
        self.texts: set[str] = set()
        self.first: dict[str, str] = {}
        """A file for every way in which classes are told: by name or by number."""

    def add(self, path: str, schema: pa.Schema, texts: tuple[str, ...]) -> None:
        """Takes in a file.

        Raises:
            InputError: its labels cannot be brought together with those of the files before.
        """
        kind = schema.field(self.column).type
        holds = kind_of(kind)
        if holds is None:
            raise InputError(
                f"label_field = {self.column!r}: is {kind} in {path}; name a column of whole "
                "numbers or text, or set labels = 'none'"
            )
        if holds == "none":
            return
        names = described_names(schema, self.column) if holds == "number" else ()
        self.described.update(dict.fromkeys(names))
        self.texts.update(texts)
        self.first.setdefault("name" if names or holds == "text" else "number", path)
        if len(self.first) > 1:
            raise InputError(
                f"label_field = {self.column!r}: {self.first['name']} names its classes, "
                f"{self.first['number']} has numbers without names, which need not mean the same; "
                "choose files by a glob, write names to all of them, or set labels = 'none'"
            )
        if len(self.texts) > MAX_CLASSES or len(self.described) > MAX_CLASSES:
            raise InputError(
                f"label_field = {self.column!r}: more than {MAX_CLASSES} different texts are no "
                "classes; name another column, or set labels = 'none'"
            )

    def names(self) -> tuple[str, ...]:
        """Described names in the order of the files, then texts in that of the alphabet.

        Raises:
            InputError: no file has any label.
        """
        if not self.first:
            raise InputError(
                f"label_field = {self.column!r}: is null in every file; name a column of whole "
                "numbers or text, or set labels = 'none'"
            )
        return (*self.described, *sorted(self.texts - set(self.described)))
