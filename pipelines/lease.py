"""One driver at a time on an output: a lease in generations, and a fence for what is written.

    _lease/000003.json          who holds generation 3; created only if absent, never changed
    _lease/000003-8f1c….beat    a number that its holder raises every few seconds
    _lease/000003-8f1c….end     its holder has let go

The newest generation holds. Who finds it ended, expired or its process dead creates the next one,
and then reads back whose it is: so a lost reply looks like a lost race, and is none. Expired means
that the heartbeat did not change for so long on the clock of the one who waits; clocks are never
compared. A holder that stood still and wakes finds a newer generation: it looks for one before
each commit (`Fence.check`) and stops.

What remains is the moment between a check and the write behind it. Manifests are created only if
absent, parts and files of tokens are equal whoever writes them, checkpoints carry hashes, and
metrics.jsonl is a file of its own for each holder: see docs/operating.md.
"""

import contextlib
import json
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines import storage
from pipelines.config.lease import LeaseConfig
from pipelines.errors import InputError, LeaseLost, StageFailed
from pipelines.lease_owner import Owner

FOLDER = "_lease"
GENERATION = re.compile(r"(\d{6,})\.json")
# Tries in a row that a store may refuse before that is told.
MAX_REFUSALS = 8


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
            path = Path(storage.absolute(self.uri))
            with contextlib.suppress(OSError):
                for left in path.glob(".*.tmp"):  # a living waiter's: it tries again
                    left.unlink(missing_ok=True)
                path.rmdir()


@dataclass(frozen=True, kw_only=True)
class _Generation:
    number: int
    nonce: str
    """Name of one lease among all that ever were."""
    follows: str
    """Nonce of the generation that was found ended."""
    expires: float
    owner: Owner
    ended: bool
    beat: bytes


@dataclass(frozen=True)
class Fence:
    """What the holder's workers are given; travels between machines."""

    store: Store
    number: int
    nonce: str

    def check(self) -> None:
        """To be called before each commit.

        Raises:
            LeaseLost: somebody else has taken over; nothing may be written any more.
            OSError: the store does not answer; nothing is known.
        """
        newest = max(_numbers(self.store.list()), default=0)
        try:
            record = _parsed(self.store.read(_name(newest)))
        except FileNotFoundError:
            raise LeaseLost(
                "another driver has taken this output over, because nothing was heard from here, "
                "and has finished it"
            ) from None
        if newest != self.number or record["nonce"] != self.nonce:
            raise LeaseLost(
                f"this output was taken over by {_owner(record)}, because nothing was heard from "
                "here; that one goes on, this one stops"
            )


class Lease:
    """One driver's way to the lease of a folder, and out of it again."""

    def __init__(
        self,
        store: Store,
        owner: Owner,
        *,
        expires: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        is_gone: Callable[[Owner], bool] = Owner.is_gone,
    ) -> None:
        self.store, self.owner, self.expires = store, owner, expires
        self.clock, self.sleep, self.is_gone = clock, sleep, is_gone
        self.nonce = uuid.uuid4().hex
        self.number = 0
        self._beats = 0
        self._seen: tuple[int, str, bytes] | None = None
        self._since = 0.0
        self._is_alive = False
        self._refusals = 0

    # -- in --------------------------------------------------------------------------------

    def take(
        self,
        *,
        poll: float,
        waiting: Callable[[Owner], None],
        alive: Callable[[Owner], None] = lambda _: None,
    ) -> Fence:
        """Returns when the lease is ours; `waiting` is told of every owner that is waited for,
        `alive` of one whose heartbeat changed since.

        Raises:
            OSError: the store refuses again and again.
        """
        told = ""
        while True:
            try:
                in_the_way = self._try()
            except InputError:  # among them what a store refuses for good
                raise
            except OSError as error:
                # What did not change while nobody could write is no sign of death.
                self._seen = None
                self._refused(error)
                in_the_way = None
            else:
                self._refusals = 0
                if in_the_way is None:
                    return Fence(self.store, self.number, self.nonce)
            if in_the_way is not None and in_the_way.nonce != told:
                told = in_the_way.nonce
                waiting(in_the_way.owner)
            elif in_the_way is not None and self._is_alive:
                alive(in_the_way.owner)
            self.sleep(poll)

    def _try(self) -> _Generation | None:
        """Takes the lease, or says who holds it."""
        while True:
            looked = self.clock()
            newest = self.newest()
            if newest is not None and newest.nonce == self.nonce:
                if self._is_next(newest):
                    self._begin(newest.number)
                    return None
                self.store.delete(_name(newest.number))
            elif newest is None or newest.ended or self._is_over(newest, looked):
                self._create_after(newest)
            else:
                return newest

    def newest(self) -> _Generation | None:
        """Who held last, as the store says now."""
        names = self.store.list()
        number = max(_numbers(names), default=0)
        if not number:
            return None
        try:
            record = _parsed(self.store.read(_name(number)))
        except FileNotFoundError:  # it was removed in this moment
            return self.newest()
        base = f"{number:06d}-{record['nonce']}"
        beat = b""
        if f"{base}.beat" in names:
            with contextlib.suppress(FileNotFoundError):
                beat = self.store.read(f"{base}.beat")
        return _Generation(
            number=number,
            nonce=record["nonce"],
            follows=record["follows"],
            expires=record["expires"],
            owner=_owner(record),
            ended=f"{base}.end" in names,
            beat=beat,
        )

    def _is_over(self, found: _Generation, looked: float) -> bool:
        """Whether its process is dead, or its heartbeat stood still while we watched.

        Between two looks it did so for as long as from the end of the first one to the beginning
        of the second (`looked`): where we stood still within a look says nothing of the holder.
        """
        if self.is_gone(found.owner):
            return True
        sign = (found.number, found.nonce, found.beat)
        if sign != self._seen:
            self._is_alive = self._seen is not None and self._seen[:2] == sign[:2]
            self._seen, self._since = sign, self.clock()
        return looked - self._since >= (found.expires or self.expires)

    def _create_after(self, newest: _Generation | None) -> None:
        number, follows = (newest.number, newest.nonce) if newest else (0, "")
        record = {
            "nonce": self.nonce,
            "follows": follows,
            "expires": self.expires,
            "owner": asdict(self.owner),
        }
        try:
            # What it answers is not looked at: whose the generation is will be read.
            self.store.create(_name(number + 1), storage.canonical_json(record))
        except InputError:
            raise
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        self._refusals += 1
        if self._refusals >= MAX_REFUSALS:
            raise error

    def _is_next(self, mine: _Generation) -> bool:
        """Whether what stands below is what we found ended: else the folder was cleared and begun
        anew between our look and our creation, and that one holds."""
        below = [number for number in _numbers(self.store.list()) if number < mine.number]
        if not below:
            return True
        try:
            record = _parsed(self.store.read(_name(max(below))))
        except FileNotFoundError:
            return self._is_next(mine)
        return bool(record["nonce"] == mine.follows)

    def _begin(self, number: int) -> None:
        self.number = number
        self.beat()
        with contextlib.suppress(OSError):
            for name in self.store.list():
                if int(re.split(r"\D", name)[0] or number) < number:
                    self.store.delete(name)

    # -- inside and out --------------------------------------------------------------------

    def beat(self) -> None:
        """Shows others that we are alive; a store that is away is tried again next time."""
        self._beats += 1
        with contextlib.suppress(OSError, LeaseLost):
            Fence(self.store, self.number, self.nonce).check()
            self.store.write(self._own("beat"), str(self._beats).encode())

    def end(self) -> None:
        """Lets go; where that cannot be told, the lease expires."""
        with contextlib.suppress(OSError, LeaseLost):
            Fence(self.store, self.number, self.nonce).check()
            self.store.write(self._own("end"), b"")

    def remove(self) -> None:
        """Lets go, and takes the traces away; those of others stay."""
        with contextlib.suppress(OSError, LeaseLost):
            Fence(self.store, self.number, self.nonce).check()
            names = [n for n in self.store.list() if int(re.split(r"\D", n)[0] or 0) <= self.number]
            # Our generation goes last: while it stands, nobody begins anew.
            for name in sorted(names, key=lambda name: (name == _name(self.number), name)):
                self.store.delete(name)

    def _own(self, kind: str) -> str:
        return f"{self.number:06d}-{self.nonce}.{kind}"


def _name(number: int) -> str:
    return f"{number:06d}.json"


def _numbers(names: list[str]) -> list[int]:
    return [int(match[1]) for match in map(GENERATION.fullmatch, names) if match]


def _parsed(data: bytes) -> dict[str, Any]:
    """A record; one that cannot be read is of an unknown owner and expires like any other."""
    unknown = {"nonce": "", "follows": "", "expires": 0.0, "owner": {}}
    try:
        record = unknown | json.loads(data)
        return record if isinstance(record["expires"], float | int) else unknown
    except (ValueError, TypeError):
        return unknown


def _owner(record: dict[str, Any]) -> Owner:
    try:
        return Owner(**record["owner"])
    except TypeError:
        return Owner(stage="another driver", host="an unknown machine", process=0)


# For stages


def is_of_lease(path: str) -> bool:
    """Whether a path below an output is no part of the artefact, but of its lease."""
    return path.partition("/")[0] == FOLDER


class Held:
    """The lease of a stage that is at work."""

    def __init__(self, fence: Fence) -> None:
        self.fence = fence
        self.is_done = False

    def done(self) -> None:
        """The artefact is finished: when the lease ends, nothing of it stays."""
        self.is_done = True


@contextlib.contextmanager
def held(output: str, config: LeaseConfig, *, stage: str) -> Iterator[Held]:
    """Inside, this driver alone writes `output`.

    Raises:
        StageFailed: another one does, whose heart beats, and `when_held` is `stop`.
        OSError: the store refuses.
    """
    folder = Folder(storage.join(output, FOLDER))
    lease = Lease(folder, Owner.here(stage, config.job), expires=config.expires_seconds)
    at_work = f"{storage.absolute(output)} is being written by"
    until = "it ends" if config.when_held == "wait" else "it ends or shows a sign of life"

    def waiting(owner: Owner) -> None:
        print(f"{stage}: {at_work} {owner}; waiting until {until}", file=sys.stderr)

    def alive(owner: Owner) -> None:
        # Whose heart does not beat may be dead: a retry after a lost machine must not stop at it.
        if config.when_held == "stop":
            raise StageFailed(f"{at_work} {owner}; nothing was done here (lease.when_held = stop)")

    poll = 0.5 if storage.is_local(output) else 5.0
    holder = Held(lease.take(poll=poll, waiting=waiting, alive=alive))
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(lease, ended), name="lease", daemon=True)
    beats.start()
    try:
        yield holder
    finally:
        ended.set()
        beats.join()
        if holder.is_done:
            lease.remove()
            folder.remove_if_empty()
        else:
            lease.end()


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(lease.expires / 6):
        lease.beat()
