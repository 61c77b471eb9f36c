"""Drivers on one lease, in a world where time, the store and the scheduler are ours.

Every call of the store is a place where another driver may go on instead. The world draws from one
seed who goes on, how long a call takes, whether its answer or its request is lost, whether a lost
request arrives after all, and who stands still or dies. Threads, of which one runs at a time, let
the real code take part as it is.
"""

import random
import threading
from dataclasses import dataclass, field

from pipelines.errors import LeaseLost
from pipelines.lease import Lease
from pipelines.lease_owner import Owner

EXPIRES = 10.0


class Dead(BaseException):
    """The process is gone: nothing handles this."""


@dataclass
class World:
    """Clock, scheduler, and the files of one folder."""

    seed: int
    faults: float = 0.05
    """Chance of each kind of loss, a call."""
    pauses: float = 0.02
    deaths: float = 0.0
    faulty: tuple[str, ...] = ("list", "read", "create", "write", "delete")
    """Calls of the store that can be lost."""
    most_delay: float = 0.5
    exclusive: bool = True
    """Whether the store creates only if absent."""
    now: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    late: list[tuple[float, str, bytes | None]] = field(default_factory=list)
    log: list[tuple] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.wakes: dict[str, float] = {}
        self.turns: dict[str, threading.Lock] = {}
        self.ended = threading.Lock()
        self.errors: list[BaseException] = []

    def spawn(self, name, action):
        self.turns[name] = threading.Lock()
        self.turns[name].acquire()
        self.wakes[name] = self.random.random() * 3

        def body():
            self.turns[name].acquire()
            try:
                action()
            except Dead:
                self.dead.add(name)
            except BaseException as error:
                self.errors.append(error)
            del self.wakes[name]
            self._next()

        threading.Thread(target=body, daemon=True).start()

    def run(self):
        self.ended.acquire()
        self._next()
        self.ended.acquire()
        if self.errors:
            raise self.errors[0]
        assert not self.wakes, f"seed {self.seed}: {sorted(self.wakes)} never came to an end"

    def _next(self, me=""):
        """Gives the turn to who wakes first; to nobody else if that is who calls."""
        if not self.wakes or self.now > 10_000:
            self.ended.release()
            return
        name = min(self.wakes, key=lambda name: (self.wakes[name], name))
        self.now = max(self.now, self.wakes[name])
        self._arrive()
        if name != me:
            self.turns[name].release()
        if me and name != me:
            self.turns[me].acquire()

    def _arrive(self):
        for item in [item for item in self.late if item[0] <= self.now]:
            self.late.remove(item)
            if item[2] is None:
                self.remove(item[1])
            elif item[1] not in self.files or not self.exclusive or not item[1].endswith(".json"):
                self.put(*item[1:])

    def put(self, name, data):
        self.files[name] = data
        if name.endswith(".json"):
            self.log.append(("created", "", name.removesuffix(".json"), self.now))
        else:
            self.log.append((name.rpartition(".")[2], "", name.rpartition(".")[0], self.now))

    def remove(self, name):
        if self.files.pop(name, None) is not None:
            self.log.append(("removed", "", name, self.now))

    def pass_time(self, name, seconds):
        """Another one may go on; this one does after `seconds`, or never."""
        if self.random.random() < self.deaths:
            raise Dead
        if self.random.random() < self.pauses:
            seconds += self.random.choice([1.0, 2 * EXPIRES, 5 * EXPIRES])
        self.wakes[name] = self.now + seconds
        self._next(name)


@dataclass
class View:
    """The folder as one driver reaches it."""

    world: World
    name: str

    def _call(self, kind, action, late=None):
        world = self.world
        faults = world.faults if kind in world.faulty else 0.0
        world.pass_time(self.name, world.random.random() * world.most_delay)
        if world.random.random() < faults:
            if late is not None and world.random.random() < 0.5:
                world.late.append((world.now + world.random.random() * 30, *late))
            raise TimeoutError("the request was lost")
        answer = action()
        world.pass_time(self.name, world.random.random() * world.most_delay)
        if world.random.random() < faults:
            raise TimeoutError("the answer was lost")
        return answer

    def list(self):
        return self._call("list", lambda: sorted(self.world.files))

    def read(self, name):
        def action():
            if name not in self.world.files:
                raise FileNotFoundError(name)
            return self.world.files[name]

        return self._call("read", action)

    def create(self, name, data):
        def action():
            if name in self.world.files and self.world.exclusive:
                return False
            self.world.put(name, data)
            return True

        return self._call("create", action, late=(name, data))

    def write(self, name, data):
        self._call("write", lambda: self.world.put(name, data), late=(name, data))

    def delete(self, name):
        self._call("delete", lambda: self.world.remove(name), late=(name, None))


def drive(world, name, *, commits, rounds=1, removes=True):
    """A driver: takes the lease, commits so often, lets go; `rounds` times."""

    def action():
        for number in range(rounds):
            lease = Lease(
                View(world, name),
                Owner(stage="test", host=name, process=number),
                expires=EXPIRES,
                clock=lambda: world.now,
                sleep=lambda seconds: world.pass_time(name, seconds),
                is_gone=lambda owner: owner.host in world.dead,
                nonce=lambda: f"{world.random.getrandbits(128):032x}",
            )
            try:
                fence = lease.take(poll=1.0, waiting=lambda _: None)
            except OSError:
                continue
            which = fence.claim
            world.log.append(("took", name, which))
            try:
                for _ in range(commits):
                    lease.beat()
                    began = len(world.log)
                    try:
                        fence.check()
                    except LeaseLost:
                        world.log.append(("lost", name, which, world.now))
                        break
                    except OSError:
                        continue
                    world.log.append(("commit", name, which, began))
                    world.pass_time(name, 1.0)
                else:
                    world.log.append(("done", name, which))
            finally:
                if name not in world.dead:
                    (lease.remove if removes and world.random.random() < 0.5 else lease.end)()

    world.spawn(name, action)
