"""Ending a training run on request, with what it has saved.

SIGTERM reaches the driver alone (a stopped job, a drained node, a time limit that comes near). It
leaves a note in the run directory; worker 0 looks for it at the end of every logging period, all
workers save after the same step, and the same command goes on from there.
"""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from pipelines.training.run_dir import RunDir

# Schedulers kill a minute or two after they have asked.
SAVE_SECONDS = 50.0


class StopRequested(Exception):  # noqa: N818 - no error: what was asked for has been done
    """All workers have saved and end."""


@contextlib.contextmanager
def saved_on_sigterm(run: RunDir, *, launched_at: float) -> Iterator[None]:
    """Inside, SIGTERM asks the workers to save and end; a second one, or workers that have not
    begun or do not answer in time, interrupt the driver."""
    run.forget_request()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(SAVE_SECONDS, _thread.interrupt_main)
    timer.daemon = True

    def request() -> None:
        # A thread: the driver may hold any lock at the moment of the signal.
        if all(attempt.launched_at != launched_at for attempt in run.attempts()):
            _thread.interrupt_main()
            return
        print("\nasked to end (SIGTERM): saving after the steps of this log", file=sys.stderr)
        timer.start()
        run.request_end()

    def on_signal(*_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: _thread.interrupt_main())
        threading.Thread(target=request, name="stop", daemon=True).start()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
