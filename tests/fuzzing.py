"""Damage to files, seeded, and what readers say to it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import InputError

SEED = 20
EQUAL, NAMED, OTHER = "equal", "named errors", "other data"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A file and its reader."""

    name: str
    path: Path
    read: Callable[[], Any]
    """What the file says, as values that can be compared."""
    errors: type[Exception] = InputError
    checked: bool = True
    """The format tells other content from damage; where it cannot, other data is no failure."""


def mutate(data: bytes, number: int) -> bytes:
    """Mutation `number` of a file: mostly one flipped bit or byte, else a piece of it."""
    random = np.random.default_rng([SEED, number, len(data)])
    at = int(random.integers(len(data)))
    length = int(random.integers(1, 64))
    changed = bytearray(data)
    match number % 8:
        case 0 | 1 | 2 | 3:
            changed[at] ^= 1 << int(random.integers(8))
        case 4:
            changed[at] = int(random.integers(256))
        case 5:
            del changed[at : at + length if number % 16 == 5 else None]
        case 6:
            changed[at:at] = changed[at : at + length]
        case 7:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
    return bytes(changed)


def outcomes(subject: Subject, mutations: int) -> Counter[str]:
    """What becomes of mutations of the file: equal data, or an error that names it.

    Anything else is counted as what it is.
    """
    sound, expected = subject.path.read_bytes(), subject.read()
    counts: Counter[str] = Counter()
    try:
        for number in range(mutations):
            subject.path.write_bytes(mutate(sound, number))
            counts[_outcome(subject, expected)] += 1
    finally:
        subject.path.write_bytes(sound)
    assert subject.read() == expected
    return counts


def _outcome(subject: Subject, expected: Any) -> str:
    try:
        return EQUAL if subject.read() == expected else OTHER
    except subject.errors as error:
        names = (subject.path.name, *(parent.name for parent in subject.path.parents[:3]))
        return NAMED if any(name in str(error) for name in names) else f"no name: {error}"
    except Exception as error:  # what must not happen is what is looked for
        return f"{type(error).__name__}: {error}"


def failures(subject: Subject, counts: Counter[str]) -> dict[str, int]:
    """What neither is equal nor has a name."""
    allowed = {EQUAL, NAMED} if subject.checked else {EQUAL, NAMED, OTHER}
    return {what: number for what, number in counts.items() if what not in allowed}


def row(subject: Subject, counts: Counter[str]) -> str:
    """A row of the table in docs/inputs.md."""
    told = [counts.total(), counts[EQUAL], counts[NAMED], 0 if subject.checked else counts[OTHER]]
    numbers = [f"{number:,}" for number in (*told, sum(failures(subject, counts).values()))]
    return "| " + " | ".join([subject.name, *numbers]) + " |"
