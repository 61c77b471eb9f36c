"""How Ctrl-C and SIGTERM end a command: in order, and with exit code 130."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

# Signals that are so close together are one.
SAME_SECONDS = 1.0


@contextlib.contextmanager
def terminated_as_interrupted(*also: int) -> Iterator[None]:
    """SIGTERM ends a stage as Ctrl-C does: ledgers are written, and the run is KILLED in MLflow.

    It is what `beit submit stop`, `kubectl delete`, `scancel` and a drained node send. Whoever
    sends to a process and to its group, as `timeout` does, means it once: the second would come
    while the first is answered. What the caller ignores (`nohup`) stays ignored. `also` are
    further signals that end a command.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    answered = -SAME_SECONDS

    def interrupt(number: int, _: object) -> None:
        nonlocal answered
        if time.monotonic() - answered < SAME_SECONDS:
            return
        answered = time.monotonic()
        name = signal.Signals(number).name
        raise KeyboardInterrupt(f"Asked to end ({name})." if number != signal.SIGINT else "")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *also)}
    before = {number: known for number, known in before.items() if known != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_as_ray_starts() -> Iterator[None]:
    """`ray.init` takes SIGTERM for itself and leaves by sys.exit then, as flags that do not parse
    do: a scheduler's next attempt would be refused.

    Interrupted, Ray's core may run and Ray not know of it: what Ray does at the end of the process
    is a segmentation fault then, and left out. Its processes end with this one.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except KeyboardInterrupt:
        atexit.register(_leave)
        raise
    except SystemExit as end:
        atexit.register(_leave)
        raise KeyboardInterrupt("Asked to end (SIGTERM).") from end
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)
