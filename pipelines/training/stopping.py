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
import time
from collections.abc import Iterator

from pipelines.errors import InputError
from pipelines.training.checkpoint import Saver
from pipelines.training.distributed import World
from pipelines.training.run_dir import RunDir

# Schedulers kill a minute or two after they have asked.
SAVE_SECONDS = 50.0


class StopRequested(Exception):  # noqa: N818 - no error: what was asked for has been done
    """All workers have saved and end."""


def stop_requested(saver: Saver, step: int, total_steps: int, world: World) -> StopRequested:
    """What all workers raise after the checkpoint of `step`, when it is written; or was not."""
    saved = saver.wait()
    if world.rank == 0 and saved != step:
        return StopRequested(f"step {step} could not be saved, see the events")
    return StopRequested(f"saved at step {step} of {total_steps}")


def preemption_notice() -> str:
    """Which nodes of this group of Ray Train will be taken away and when; "": none. A barrier."""
    from ray.train import get_preemption_info

    info = get_preemption_info()
    if info is None:
        return ""
    nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
    seconds = max(0.0, (info.deadline_ms or 0) / 1000 - time.time())
    when = f" in {seconds:.0f} s" if info.deadline_ms else ""
    return f"node {nodes} with workers {info.preempted_ranks} will be taken away{when}"


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt("Asked to end (SIGTERM).")


def _interrupt() -> None:
    # Not SIGINT: its handler may be Ray's, which ends the process with code 0.
    _thread.interrupt_main(signal.SIGTERM)


@contextlib.contextmanager
def saved_on_sigterm(run: RunDir, *, launched_at: float) -> Iterator[None]:
    """Inside, SIGTERM asks the workers to save and end; a second one, or workers that have not
    begun or do not answer in time, interrupt the driver."""
    run.forget_request()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(SAVE_SECONDS, _interrupt)
    timer.daemon = True

    def request() -> None:
        # A thread: the driver may hold any lock at the moment of the signal.
        timer.start()
        with contextlib.suppress(OSError, InputError):
            if any(attempt.launched_at == launched_at for attempt in run.attempts()):
                print("\nasked to end (SIGTERM): saving after this log", file=sys.stderr)
                run.request_end()
                return
        _interrupt()

    def on_signal(*_: object) -> None:
        signal.signal(signal.SIGTERM, _raise_interrupt)
        threading.Thread(target=request, name="stop", daemon=True).start()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
