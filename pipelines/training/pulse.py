"""Signs of life of workers, and who stands still.

Every worker has a thread that writes `pulse/RANK.json` every few seconds: where it is, for how
long, and how long a step usually takes. The driver reads them. A worker whose thread is silent is
stopped, dead or cut off; one that says it is at the same place for many steps' time hangs there, or
waits for another one, which its place tells. Nothing here takes part in a step.
"""

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pipelines import storage
from pipelines.errors import InputError, LeaseLost
from pipelines.records import read_record, write_record
from pipelines.training.goodput import Books
from pipelines.training.run_dir import RunDir

DIRECTORY = "pulse"
STALLED, STALL_ENDED = "stalled", "stall_ended"
# Only these are expected to end within some steps' time.
OF_STEPS = ("compute", "data_wait")
# A step that usually takes milliseconds may take seconds now and then.
LEAST_SECONDS = 20.0
# Where it is not known how long a step takes, and where all are silent, as in a restart.
UNKNOWN_SECONDS = 120.0
WAITING = ("all_reduce", "allreduce", "barrier", "broadcast", "all_gather", "gather", "backward")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One sign of life."""

    rank: int
    host: str
    process: int
    number: int
    """Of this sign, so that each is another one."""
    doing: str
    """Category of the time books."""
    still: float
    """Seconds since the last step, or since it began to do this."""
    usual: float
    """Seconds of a step; 0: not known yet."""
    place: list[str] = field(default_factory=list)
    """Functions that it is in, the innermost first."""

    @property
    def name(self) -> str:
        """As a person is told of it."""
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Pulse:
    """The thread of a worker; ends the process where it stood still for `limit` seconds."""

    def __init__(
        self, run: RunDir, books: Books, *, rank: int, limit: float | None, every: float = 0.0
    ) -> None:
        self.run, self.books, self.rank, self.limit = run, books, rank, limit
        self.every = every or (2.0 if storage.is_local(run.uri) else 20.0)
        self.main = threading.get_ident()
        self.number, self.moved, self.seen = 0, time.monotonic(), (books.steps, books.doing)
        self.usual: deque[float] = deque(maxlen=15)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(timeout=10)
        with contextlib.suppress(OSError):
            storage.delete(self.run.at(DIRECTORY, f"{self.rank}.json"))

    def _work(self) -> None:
        while not self.ended.wait(self.every):
            beat = self.beat()
            try:
                place = self.run.at(DIRECTORY, f"{self.rank}.json")
                write_record(place, asdict(beat), check=self.run.check)
            except (OSError, InputError):
                continue  # the store is away
            except LeaseLost:
                return
            if self.limit and beat.usual and beat.doing in OF_STEPS and beat.still > self.limit:
                print(f"{beat.name}: {_told(beat)}; it ends, to be restarted", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def beat(self) -> Beat:
        """What there is to tell now."""
        now, here = time.monotonic(), (self.books.steps, self.books.doing)
        if here != self.seen:
            steps = here[0] - self.seen[0]
            if steps and self.seen[0]:
                self.usual.append((now - self.moved) / steps)
            self.seen, self.moved = here, now
        self.number += 1
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            number=self.number,
            doing=here[1],
            still=round(now - self.moved, 1),
            usual=statistics.median(self.usual) if self.usual else 0.0,
            place=_place(self.main),
        )


def _place(thread: int) -> list[str]:
    """The innermost functions of a thread."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame)[-8:] if frame else []
    return [f"{one.name} ({Path(one.filename).name}:{one.lineno})" for one in reversed(frames)]


class Stalls:
    """The driver's look at all pulses."""

    def __init__(
        self, run: RunDir, *, factor: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run, self.factor, self.clock = run, factor, clock
        self.heard: dict[int, tuple[Beat, float]] = {}
        self.told = False

    def look(self) -> None:
        """Writes an event when workers begin to stand still, and when that ends."""
        self._hear()
        message = self.message()
        if message and not self.told:
            self.told = True
            self.run.event(STALLED, message=message)
        elif self.told and not message and not self._silent():
            self.told = False
            self.run.event(STALL_ENDED, message="all workers move again")

    def _hear(self) -> None:
        beats = {}
        for file in storage.list_files(self.run.at(DIRECTORY), ".json"):
            try:
                uri = self.run.at(DIRECTORY, file.path)
                beat = read_record(uri, Beat, "it is written again")
            except FileNotFoundError:
                continue  # its worker has just ended
            before = self.heard.get(beat.rank)
            heard = before[1] if before and before[0] == beat else self.clock()
            beats[beat.rank] = (beat, heard)
        self.heard = beats

    def message(self) -> str:
        """Who stands still, since when, and what the others do; "" if nobody does."""
        silent = self._silent()
        if len(silent) == len(self.heard) and max(silent.values(), default=0) < UNKNOWN_SECONDS:
            silent = {}  # a restart
        living = [beat for rank, (beat, _) in self.heard.items() if rank not in silent]
        # Who waits for a silent one began to a little later.
        share = 0.5 if silent else 1.0
        still = [beat for beat in living if self._stands_still(beat, share)]
        if not silent and not still:
            return ""
        hanging = [beat for beat in still if not _waits(beat)] if not silent else []
        hanging = hanging or ([] if silent else still)
        told = [
            f"{self.heard[rank][0].name} shows no sign of life {_since(seconds)}"
            for rank, seconds in silent.items()
        ]
        told += [f"{beat.name} {_told(beat)}" for beat in hanging]
        others = [beat for beat in still if beat not in hanging]
        told += [f"{beat.name} waits, {_told(beat)}" for beat in others]
        usual = max(beat.usual for beat, _ in self.heard.values())
        return "; ".join(told) + (f". A step usually takes {usual:.2g} s" if usual else "")

    def _silent(self) -> dict[int, float]:
        """Ranks of which nothing was heard for long, with the seconds."""
        now = self.clock()
        return {
            rank: now - heard
            for rank, (beat, heard) in self.heard.items()
            if now - heard > self._patience(beat)
        }

    def _stands_still(self, beat: Beat, share: float) -> bool:
        of_steps = beat.usual > 0 and beat.doing in OF_STEPS
        return of_steps and beat.still > share * self._patience(beat)

    def _patience(self, beat: Beat) -> float:
        least = max(LEAST_SECONDS, 60.0 if not storage.is_local(self.run.uri) else 0.0)
        return max(least, self.factor * beat.usual) if beat.usual else UNKNOWN_SECONDS


def _waits(beat: Beat) -> bool:
    """Whether its place is one where workers meet."""
    return any(name in place for place in beat.place for name in WAITING)


def _told(beat: Beat) -> str:
    doing = "waits for data" if beat.doing == "data_wait" else "is in a step"
    return f"{doing} {_since(beat.still)}, in {_shortened(beat.place)}"


def _shortened(place: Sequence[str]) -> str:
    return " < ".join(place[:3]) or "an unknown place"


def _since(seconds: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    return f"since {clock} ({seconds:.0f} s)"
