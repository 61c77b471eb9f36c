"""The folder of a lease, and what stands in it: claims, heartbeats, marks of an end."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines import storage
from pipelines.lease_owner import Owner

CLAIM, BEAT, END = ".json", ".beat", ".end"


class Store(Protocol):
    """What a lease needs of a folder; every call may raise OSError."""

    def list(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def write(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


@dataclass(frozen=True)
class Folder:
    """The `Store` at a URI."""

    uri: str

    def list(self) -> list[str]:
        return [file.path for file in storage.list_files(self.uri, recursive=False)]

    def read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.uri, name))

    def create(self, name: str, data: bytes) -> bool:
        return storage.create(storage.join(self.uri, name), data)

    def write(self, name: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.uri, name), data)

    def delete(self, name: str) -> None:
        storage.delete(storage.join(self.uri, name))

    def remove_if_empty(self) -> None:
        """Takes a local directory away that nobody else uses, with what killed ones half wrote."""
        if storage.is_local(self.uri):
            storage.remove_half_written(self.uri)  # a living waiter's: it tries again
            with contextlib.suppress(OSError):
                Path(storage.absolute(self.uri)).rmdir()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That somebody wants the lease, or has it: a file that is created once and never changed."""

    name: str
    """Number and nonce: never used a second time, so no late request meets another claim."""
    over: tuple[str, ...] = ()
    """Names of the claims that stood there and were found ended, expired or dead."""
    expires: float = 0.0
    """Seconds without a sign of life after which it counts no more; 0: not known."""
    owner: Owner
    ended: bool = False
    beat: bytes = b""

    @property
    def number(self) -> int:
        """One more than those that it was found over, for people and for order in listings."""
        return int(re.split(r"\D", self.name)[0] or 0)

    def record(self) -> bytes:
        """What its file says."""
        values = {"over": self.over, "expires": self.expires, "owner": asdict(self.owner)}
        return storage.canonical_json(values)


def names_of_claims(files: Sequence[str]) -> list[str]:
    """The claims among the files of a lease."""
    return [file.removesuffix(CLAIM) for file in files if file.endswith(CLAIM)]


def read_claims(store: Store) -> list[Claim]:
    """All that stand, as the store says now."""
    files = store.list()
    try:
        return [read_claim(store, name, files) for name in names_of_claims(files)]
    except FileNotFoundError:  # one was removed in this moment
        return read_claims(store)


def read_claim(store: Store, name: str, files: Sequence[str] = ()) -> Claim:
    """A claim, with what the listed `files` say of it; raises FileNotFoundError if it has gone."""
    claim = _parsed(name, store.read(name + CLAIM))
    beat = b""
    if name + BEAT in files:
        with contextlib.suppress(FileNotFoundError):
            beat = store.read(name + BEAT)
    ended = name + END in files
    return Claim(**{**vars(claim), "beat": beat, "ended": ended})


def _parsed(name: str, data: bytes) -> Claim:
    """One that cannot be read is of an unknown owner, and expires like any other."""
    try:
        record: dict[str, Any] = json.loads(data)
        return Claim(
            name=name,
            over=tuple(map(str, record["over"])),
            expires=float(record["expires"]),
            owner=Owner(**record["owner"]),
        )
    except (ValueError, TypeError, KeyError):
        unknown = Owner(stage="another driver", host="an unknown machine", process=0)
        return Claim(name=name, owner=unknown)
