"""Lines for the user: what a command does, and what it waits for before its work begins."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_BEGAN = time.monotonic()


def ray_is_there() -> None:
    """The `start_ray` of a stage whose process has Ray already, or needs none."""


def say(text: str) -> None:
    """A line for the user."""
    print(text, file=sys.stderr)


def say_step(text: str) -> None:
    """A line for the user: the time, seconds since the command began, what happens now."""
    now, passed = time.strftime("%H:%M:%S", time.gmtime()), time.monotonic() - _BEGAN
    print(f"[{now}Z +{passed:.0f} s] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def said_if_slow(what: str, every: float) -> Iterator[None]:
    """Says what is waited for while the block lasts, as often as `every` seconds pass, and after
    six of those a sixth as often."""
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        said = 0
        while not ended.wait(every if said < 6 else 6 * every):
            said += 1
            say_step(f"still waiting for {what} after {time.monotonic() - began:.0f} s")

    threading.Thread(target=watch, name="still waiting", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
