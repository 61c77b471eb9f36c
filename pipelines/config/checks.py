"""What all configurations share: bounds of their fields, and their record beside what they made.

A field states its bounds with its type, `Annotated[int, Ge(1)]`, and `check` holds every field of
a section to them and to the choices of a `Literal`. What relates fields to each other is code, in
`__post_init__` after `check`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from pipelines.errors import InputError
from pipelines.redaction import redacted_values


@dataclass(frozen=True, repr=False)
class Bound:
    """A bound on a number; on every entry of a tuple. None passes: the type says if it may be."""

    limit: float
    words: ClassVar[str]

    def __repr__(self) -> str:
        """As --help and errors put it."""
        return f"{self.words} {self.limit}"

    def holds(self, value: float) -> bool:
        """Whether a number keeps to it; NaN never does."""
        raise NotImplementedError


class Ge(Bound):
    words = "at least"

    def holds(self, value: float) -> bool:
        return value >= self.limit


class Gt(Bound):
    words = "above"

    def holds(self, value: float) -> bool:
        return value > self.limit


class Le(Bound):
    words = "at most"

    def holds(self, value: float) -> bool:
        return value <= self.limit


class Lt(Bound):
    words = "below"

    def holds(self, value: float) -> bool:
        return value < self.limit


@dataclass(frozen=True)
class Before:
    """What a run had that was begun before its field existed, where that is not the default."""

    value: Any


def check(section: Any, prefix: str = "") -> None:
    """Raises InputError for the first field that is out of bounds or none of its choices.

    `prefix` is where the section stands in its configuration: `optim.`. A text among the bounds
    goes into the error, as remedy.
    """
    for name, kind, notes in _declared(type(section)):
        value = getattr(section, name)
        label = prefix + name
        more = "".join(f"; {note}" for note in notes if isinstance(note, str))
        if get_origin(kind) is Literal:
            one_of(label, value, get_args(kind), more)
        bounds = [note for note in notes if isinstance(note, Bound)]
        entries = value if isinstance(value, tuple) else () if value is None else (value,)
        kept = all(bound.holds(entry) for entry in entries for bound in bounds)
        require(kept, label, value, f"must be {' and '.join(map(str, bounds))}{more}")
        finite = all(math.isfinite(entry) for entry in entries if isinstance(entry, float))
        require(finite, label, value, f"give a finite number{more}")


def _declared(section: type) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Name, type and what else is declared of every field."""
    hints = get_type_hints(section, include_extras=True)
    fields = []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        fields.append((field.name, kind, tuple(notes)))
    return fields


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises InputError naming the dotted field, its value and what to do instead."""
    if not condition:
        raise InputError(f"{name} = {value!r}: {remedy}")


def one_of(name: str, value: object, options: tuple[str, ...], more: str = "") -> None:
    """Raises InputError unless `value` is one of `options`."""
    require(value in options, name, value, f"choose {', '.join(options)}{more}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted fields."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """The effective configuration as plain values, for records."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config))
    return values


class _NoField:
    def __repr__(self) -> str:
        return "no field of this version"


NO_FIELD = _NoField()


def changed_fields(
    old: Mapping[str, Any], config: Any, may_change: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted fields that differ from a record of earlier and must not, with both values.

    The record may be of another version: a field that it lacks had its default then, or what it
    declares as `Before`; one that this version lacks is named, with `NO_FIELD`. `may_change` names
    fields and whole sections. Secrets of URIs are no difference: records are without them.
    """
    new = to_dict(config)
    was = filled_record(type(config), {**_required(type(config), new), **old})
    before, after = redacted_values(was), redacted_values(flatten(new))
    return {
        name: (value, after.get(name, NO_FIELD))
        for name, value in before.items()
        if after.get(name, NO_FIELD) != value
        and name not in may_change
        and name.partition(".")[0] not in may_change
    }


def filled_record(kind: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted fields of a record, with what it means by those that it lacks.

    Fields without default are in every record.
    """
    return flatten(_plain(_then(kind(**_required(kind, record))))) | flatten(record)


def _required(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }


def _then(section: Any) -> dict[str, Any]:
    values = {}
    for name, _, notes in _declared(type(section)):
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            values[name] = _then(value)
        else:
            values[name] = next((note.value for note in notes if isinstance(note, Before)), value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
