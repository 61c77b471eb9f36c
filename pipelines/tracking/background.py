"""Fills a run in a thread while its stage works, and once more at the end, for a bounded time."""

import contextlib
import logging
import threading
import time

from pipelines.redaction import redacted_text
from pipelines.tracking.filler import Filler

log = logging.getLogger(__name__)

MAX_PAUSE, BEAT_EVERY = 60.0, 30.0
# Seconds that the end of a stage may take at most, beside the upload of its weights.
LONGEST_CLOSE = 600.0


class Background:
    """Nobody waits for the server but this thread; a server that is away is asked less and less.

    Args:
        filler: what is done.
        every: seconds between two calls, more where one takes long.
        shown: what the store is called in messages.
    """

    def __init__(self, filler: Filler, *, every: float, shown: str) -> None:
        self.filler, self.shown = filler, shown
        self.complete = False
        self._every = every
        self._away = False
        self._wake, self._closing, self._given_up = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        # Of its own: filling takes long where a server is slow, and the run lives all the while.
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def close(self) -> bool:
        """Lets everything be sent that waits; whether MLflow has it all.

        Gives up when the server has taken nothing new for `Filler.patience` seconds.
        """
        last = time.monotonic() + LONGEST_CLOSE
        self.filler.deadline = time.monotonic() + self.filler.patience
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive():
            if time.monotonic() > min(self.filler.deadline, last + self.filler.allowance):
                break
            self._thread.join(0.05)
        self._given_up.set()
        return self.complete

    def _work(self) -> None:
        pause = 0.0
        while not self._given_up.is_set():
            closing, began = self._closing.is_set(), time.monotonic()
            try:
                self.filler.fill(final=closing)
                if closing:
                    self.complete = True
                    return
                pause = 0.0
                self._say_back()
            except Exception as error:
                pause = min(MAX_PAUSE, max(1.0, 2 * pause))
                self._say_away(error)
            # A large spool takes seconds to read: at most a twentieth of the time goes into it.
            took = time.monotonic() - began
            self._wait(max(self._every, pause, min(20 * took, MAX_PAUSE)))

    def _beat(self) -> None:
        while not self._given_up.is_set():
            with contextlib.suppress(Exception):  # filling tells what the server refuses
                self.filler.beat()
            self._given_up.wait(BEAT_EVERY)

    def _wait(self, seconds: float) -> None:
        if self._closing.is_set():  # hurried: somebody waits
            self._given_up.wait(1.0)
        else:
            self._wake.wait(seconds)

    def _say_away(self, error: Exception) -> None:
        if self._away:
            return
        self._away = True
        reason = (
            redacted_text(str(error)).splitlines()[0][:200] if str(error) else type(error).__name__
        )
        log.warning("tracking: %s takes nothing (%s); the stage goes on", self.shown, reason)

    def _say_back(self) -> None:
        if self._away:
            self._away = False
            log.warning("tracking: %s is back", self.shown)
