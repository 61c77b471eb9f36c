"""Ray Train for a stage whose workers keep their own checkpoints: start them, watch them, end."""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pipelines import storage
from pipelines.errors import StageFailed
from pipelines.progress import Progress


class ProgressSink:
    """Takes a worker's progress: shows it here, or hands it to the driver that shows it."""

    def __init__(self, label: str, *, unit: str = "steps", board: Any = None) -> None:
        self.label, self.unit, self.board = label, unit, board
        self._progress: Progress | None = None
        self._last_put: Any = None

    def start(self, total: int, initial: int) -> None:
        """States the total, and what an earlier run did of it."""
        if self.board is not None:
            self._last_put = self.board.put.remote("start", (total, initial))
            return
        self._progress = Progress(total, self.label, self.unit, initial=initial)

    def update(self, done: int, **fields: object) -> None:
        """States that `done` units are finished."""
        if self.board is not None:
            self._last_put = self.board.put.remote("update", (done, fields))
        elif self._progress is not None:
            self._progress.update(done, **fields)

    def close(self) -> None:
        """Ends the line; what a worker put on the board has arrived when this returns."""
        if self._last_put is not None:
            import ray

            # A worker's process ends with its function, and takes unsent messages along.
            ray.wait([self._last_put], timeout=10)
            self._last_put = None
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class _Board:
    """What the workers last said; an actor."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def put(self, kind: str, value: Any) -> None:
        if kind == "start":
            self.state.pop("update", None)  # of a worker group that is gone
        self.state[kind] = value

    def get(self) -> dict[str, Any]:
        return self.state


def fit_with_ray(
    worker: Callable[[Any, ProgressSink], None],
    job: Any,
    *,
    label: str,
    num_workers: int,
    use_gpu: bool,
    cpus_per_worker: int,
    max_failures: int,
    state_uri: str,
) -> None:
    """Runs `worker(job, progress)` on every worker of a Ray Train group and waits.

    A worker that dies takes its group down; a new one is started, up to `max_failures` times.
    Rank 0's progress is shown here. `state_uri` holds what Ray writes about the run.

    Raises:
        StageFailed: the group failed too often; the message is that of the last failure.
    """
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    board = ray.remote(num_cpus=0)(_Board).remote()
    filesystem, path = storage.resolve(state_uri)
    resources = {"CPU": cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "job": job, "board": board, "label": label},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # A new name each time: what to continue from is in the stage's own checkpoints.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig("ERROR"),
        ),
    )
    try:
        with _shown(board, label):
            trainer.fit()
    except TrainingFailedError as error:
        raise StageFailed(
            f"{label}: the workers failed too often, at last with: {error}"
        ) from error
    finally:
        ray.kill(board)


def _run_worker(config: dict[str, Any]) -> None:
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    board = config["board"] if first else _Silent()
    config["worker"](config["job"], ProgressSink(config["label"], board=board))


class _Silent:
    """A board that nobody reads: the progress of the other workers."""

    def __init__(self) -> None:
        self.put = self

    def remote(self, *_: object) -> None:
        """Does nothing."""


@contextlib.contextmanager
def _shown(board: Any, label: str) -> Iterator[None]:
    """Shows in this process what the workers put on the board."""
    import ray

    stop = threading.Event()

    def show() -> None:
        progress: Progress | None = None
        begun = None
        while True:
            ended = stop.wait(0.5)
            with contextlib.suppress(ray.exceptions.RayError):
                state = ray.get(board.get.remote(), timeout=5)
                if "start" in state and (progress is None or begun != state["start"]):
                    begun = state["start"]
                    progress = Progress(begun[0], label, "steps", initial=begun[1])
                if progress is not None and "update" in state:
                    done, fields = state["update"]
                    progress.update(done, **fields)
            if ended:
                if progress is not None:
                    progress.close()
                return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
