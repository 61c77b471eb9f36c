"""What all configurations share: checks that name the field, and dotted names of nested fields."""

from collections.abc import Mapping
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
