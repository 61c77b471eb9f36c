"""One driver at a time on an output: claims, of which one holds, and a fence for what is written.

    _lease/000003-8f1c….json    who claims, and which claims he found over; never changed
    _lease/000003-8f1c….beat    a number that its holder raises every few seconds
    _lease/000003-8f1c….end     its holder has let go

Who wants to write looks until every claim that stands is over (ended, expired, or its process
dead), sets up his own, naming those, and then looks again. If none stands but his own and those
that he found over, he holds the lease; else he takes his claim back and waits. Of two that claim in
one moment, at least one sees the other in his second look: so never two hold, on any store whose
listings show what was written before. A lost answer is no trouble: the second look tells. No name
is used twice, so a request that arrives late, deletions among them, meets nobody else's claim.

Expired means that the heartbeat did not change for so long on the clock of the one who waits;
clocks are never compared. A holder that stood still and wakes finds its claim gone, or named by
another one: it looks before each commit (`Fence.check`) and stops.

What remains is the moment between a check and the write behind it: see docs/operating.md.
"""

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines import storage
from pipelines.config.lease import LeaseConfig
from pipelines.errors import InputError, LeaseLost, StageFailed
from pipelines.lease_owner import Owner
from pipelines.lease_store import (
    BEAT,
    CLAIM,
    END,
    Claim,
    Folder,
    Store,
    names_of_claims,
    read_claim,
    read_claims,
)

FOLDER = "_lease"
# Tries in a row that a store may refuse before that is told.
MAX_REFUSALS = 8


@dataclass(frozen=True)
class Fence:
    """What the holder's workers are given; travels between machines."""

    store: Store
    claim: str

    def check(self) -> None:
        """To be called before each commit.

        Raises:
            LeaseLost: somebody else has taken over; nothing may be written any more.
            OSError: the store does not answer; nothing is known.
        """
        names = names_of_claims(self.store.list())
        try:
            others = [read_claim(self.store, name) for name in names if name != self.claim]
        except FileNotFoundError:  # one has gone in this moment, perhaps with ours
            self.check()
            return
        if self.claim in names:
            others = [other for other in others if self.claim in other.over]
        elif not others:
            raise LeaseLost(
                "another driver has taken this output over, because nothing was heard from here, "
                "and has finished it"
            )
        if others:
            raise LeaseLost(
                f"this output was taken over by {others[-1].owner}, because nothing was heard from "
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
        nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.store, self.owner, self.expires = store, owner, expires
        self.clock, self.sleep, self.is_gone, self.nonce = clock, sleep, is_gone, nonce
        self.claim: Claim | None = None
        self._holds = False
        self._beats = self._refusals = 0
        self._given_up: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._alive: set[str] = set()

    @property
    def fence(self) -> Fence:
        """Of the claim that was set up."""
        assert self.claim
        return Fence(self.store, self.claim.name)

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
            in_the_way = None
            try:
                in_the_way = self._try()
                if in_the_way:
                    self._refusals = 0
            except InputError:  # among them what a store refuses for good
                raise
            except OSError:
                # What did not change while nobody could write is no sign of death.
                self._seen.clear()
                self._refusals += 1
                if self._refusals >= MAX_REFUSALS:
                    raise
            if self._holds:
                return self.fence
            if in_the_way and in_the_way.name != told:
                told = in_the_way.name
                waiting(in_the_way.owner)
            elif in_the_way and told in self._alive:
                alive(in_the_way.owner)
            # Unequal pauses: two that claim in the same moment do not do so again and again.
            self.sleep(poll * (0.5 + int(self.nonce()[:4], 16) / 0x10000))

    def _try(self) -> Claim | None:
        """Takes the lease, or says who is in the way, if not only one that claims with us."""
        looked, claims = self.clock(), read_claims(self.store)
        if self.claim is None:
            living = [claim for claim in claims if not self._is_over(claim, looked)]
            if living:
                return living[-1]
            self._set_up(claims)
            claims = read_claims(self.store)
        assert self.claim
        mine = self.claim.name
        others = [claim for claim in claims if claim.name != mine]
        known = all(other.name in self.claim.over for other in others)
        if known and len(others) < len(claims) and not any(mine in other.over for other in others):
            self._begin()
        else:
            self._take_back()
        return None

    def _is_over(self, found: Claim, looked: float) -> bool:
        """Whether it has ended, its process is dead, or its heartbeat stood still while we watched.

        Between two looks it did so for as long as from the end of the first one to the beginning
        of the second (`looked`): where we stood still within a look says nothing of the holder.
        """
        if found.ended or found.name in self._given_up or self.is_gone(found.owner):
            return True
        beat, since = self._seen.get(found.name, (None, 0.0))
        if beat != found.beat:
            if beat is not None:
                self._alive.add(found.name)
            self._seen[found.name] = found.beat, self.clock()
            return False
        return looked - since >= (found.expires or self.expires)

    def _set_up(self, over: list[Claim]) -> None:
        number = 1 + max((claim.number for claim in over), default=0)
        self.claim = Claim(
            name=f"{number:06d}-{self.nonce()}",
            over=tuple(claim.name for claim in over),
            expires=self.expires,
            owner=self.owner,
        )
        self.store.create(self.claim.name + CLAIM, self.claim.record())

    def _take_back(self) -> None:
        """For good: it may arrive yet, so another one has another name."""
        assert self.claim
        name, self.claim = self.claim.name, None
        self._given_up.add(name)
        self.store.delete(name + CLAIM)

    def _begin(self) -> None:
        self._holds = True
        self.beat()
        with contextlib.suppress(OSError):
            self._delete_others()

    def _delete_others(self) -> None:
        """Claims that were found over, and what is left of such; those of living ones stay."""
        assert self.claim
        files = self.store.list()
        kept = {self.claim.name, *names_of_claims(files)} - {*self.claim.over, *self._given_up}
        for file in files:
            if file.rpartition(".")[0] not in kept:
                self.store.delete(file)

    def is_lost(self) -> bool:
        """Whether our claim counts no more, as far as the store says."""
        try:
            self.fence.check()
        except (OSError, LeaseLost) as error:
            return isinstance(error, LeaseLost)
        return False

    # -- inside and out --------------------------------------------------------------------

    def beat(self) -> None:
        """Shows others that we are alive; a store that is away is tried again next time."""
        self._beats += 1
        self._mark(BEAT, str(self._beats).encode())

    def end(self) -> None:
        """Lets go; where that cannot be told, the lease expires."""
        self._mark(END, b"")

    def remove(self) -> None:
        """Lets go, and takes the traces away; those of others stay."""
        assert self.claim
        self.end()
        with contextlib.suppress(OSError, LeaseLost):
            self.fence.check()
            # Ours goes last: while it stands, none that it is over for counts again.
            self._delete_others()
            for kind in (CLAIM, BEAT, END):
                self.store.delete(self.claim.name + kind)

    def _mark(self, kind: str, data: bytes) -> None:
        assert self.claim
        file = self.claim.name + kind
        with contextlib.suppress(OSError):
            try:
                self.fence.check()
                self.store.write(file, data)
                self.fence.check()
            except LeaseLost:  # between the two, the folder may have been cleared
                self.store.delete(file)


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
        # What our predecessors had in flight when they stood still or died does not arrive.
        storage.remove_half_written(output, below=FOLDER)
        yield holder
    finally:
        ended.set()
        beats.join()
        if holder.is_done:
            lease.remove()
        else:
            lease.end()
        if lease.is_lost():  # its claim is gone: at its end, or since another one took over
            folder.remove_if_empty()


def clear(output: str, config: LeaseConfig, *, stage: str) -> None:
    """Beside an artefact that is finished: what a killed driver left of its lease goes.

    Raises:
        StageFailed: as `held`.
    """
    with contextlib.suppress(OSError):  # it may be read-only, and the artefact is sound
        if storage.exists(storage.join(output, FOLDER)):
            with held(output, config, stage=stage) as holder:
                holder.done()


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(lease.expires / 6):
        lease.beat()
