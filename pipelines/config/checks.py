"""What all configurations share: checks that name the field, and dotted names of nested fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.errors import InputError


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises InputError naming the dotted field, its value and what to do instead."""
    if not condition:
        raise InputError(f"{name} = {value!r}: {remedy}")


def one_of(name: str, value: object, options: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is one of `options`."""
    require(value in options, name, value, "choose " + ", ".join(options))


def at_least(name: str, value: float, low: float) -> None:
    """Raises InputError for a value below `low`."""
    require(value >= low, name, value, f"must be at least {low}")


def fields_at_least(section: object, prefix: str = "", **bounds: float) -> None:
    """Raises InputError for the first field of `section` that is below its bound."""
    for name, low in bounds.items():
        at_least(prefix + name, getattr(section, name), low)


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
    """The effective configuration as plain values, for config.yaml."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config))
    return values


def changed_fields(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted fields that differ and must not, with both values (None where a field is missing).

    `may_change` names fields and whole sections.
    """
    before, after = flatten(old), flatten(new)
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and name not in may_change
        and name.partition(".")[0] not in may_change
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
