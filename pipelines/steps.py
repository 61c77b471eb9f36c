"""Lines that say what a command waits for before its work begins, with the time."""

import sys
import time

_BEGAN = time.monotonic()


def ray_is_there() -> None:
    """The `start_ray` of a stage whose process has Ray already, or needs none."""


def say_step(text: str) -> None:
    """A line for the user: the time, seconds since the command began, what happens now."""
    now, passed = time.strftime("%H:%M:%S", time.gmtime()), time.monotonic() - _BEGAN
    print(f"[{now}Z +{passed:.0f} s] {text}", file=sys.stderr, flush=True)
