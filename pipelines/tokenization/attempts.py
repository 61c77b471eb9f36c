"""Which work began and has not ended: how the deaths of processes are counted."""

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Attempts:
    """Actor beside the driver."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}

    def begin(self, stage: str, unit: int) -> int:
        """Notes a beginning; returns how many earlier ones saw no end."""
        name = f"{stage}-{unit}"
        deaths = self.open.get(name, 0)
        self.open[name] = deaths + 1
        return deaths

    def end(self, stage: str, unit: int) -> None:
        self.open.pop(f"{stage}-{unit}", None)


def start_attempts() -> ActorHandle:
    """Starts `Attempts` on the driver's node: it must not die with the workers it watches."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle: ActorHandle = (
        ray.remote(Attempts)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here)
        .remote()
    )
    return handle


def begin_attempt(attempts: ActorHandle | None, stage: str, unit: int) -> int:
    """`Attempts.begin`, called by a worker."""
    if attempts is None:
        return 0
    try:
        deaths: int = ray.get(attempts.begin.remote(stage, unit), timeout=60)
    except (ray.exceptions.RayError, TimeoutError):
        # Without the count a unit is retried more often than it should; nothing else.
        return 0
    return deaths


def end_attempt(attempts: ActorHandle | None, stage: str, unit: int) -> None:
    """`Attempts.end`, called by a worker; it does not wait."""
    if attempts is not None:
        attempts.end.remote(stage, unit)
