"""One line that says how far a stage is, how fast it goes and when it will be done."""

import sys
import time
from typing import TextIO

from tqdm import tqdm


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Progress:
    """Progress of `total` units of work.

    On a terminal one line is rewritten; elsewhere (a log file, a submitted job) a new line is
    printed every `log_every` seconds. Work done by an earlier, interrupted run is passed as
    `initial`, so that rate and estimate speak of this run; `counted_from` leaves starting up out of
    them.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        log_every: float = 10.0,
    ) -> None:
        self.total, self.label, self.unit, self.initial = total, label, unit, initial
        self.stream = stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self.every = 0.2 if self.on_terminal else log_every
        self.done = initial
        self.fields: dict[str, str] = {}
        self.start = time.monotonic()
        self.printed = self.start
        self.width = 0
        self.told = False

    def update(self, done: int, **fields: object) -> None:
        """States that `done` units (in total) are finished; `fields` are shown at the end."""
        shown = self.fields | {name: str(value) for name, value in fields.items()}
        self.told = self.told and (done, shown) == (self.done, self.fields)
        self.done, self.fields = done, shown
        if time.monotonic() - self.printed >= self.every:
            self._print()

    def counted_from(self, done: int, seconds_ago: float) -> None:
        """Rate and estimate speak of what was done after `done`, in so many seconds up to now."""
        self.initial, self.start = done, time.monotonic() - seconds_ago
        self.told = False

    def close(self) -> None:
        """Prints the last state, unless it stands there, and ends the line."""
        if not self.told:
            self._print()
        if self.on_terminal:
            self.stream.write("\n")
            self.stream.flush()

    def _print(self) -> None:
        self.printed, self.told = time.monotonic(), True
        elapsed = self.printed - self.start
        meter = tqdm.format_meter(
            n=self.done,
            total=self.total,
            elapsed=elapsed,
            initial=self.initial,
            prefix=self.label,
            unit=f" {self.unit}",
            ncols=0 if not self.on_terminal else 60,
            unit_scale=self.total >= 100_000,
        )
        line = "  ".join([meter, *(f"{name} {value}" for name, value in self.fields.items())])
        if self.on_terminal:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
