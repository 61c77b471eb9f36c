"""Load of this machine, sampled by MLflow's own monitors in a thread, and written as lines.

MLflow's own thread asks the server for the run before every sample, stops for ever at the first
failure, and waits without limit at the end.
"""

import threading
import time
from typing import Any

from pipelines.errors import LeaseLost
from pipelines.tracking.spool import LinesFile


class SystemMetrics:
    """Samples every few seconds and writes averages, until it is closed.

    Args:
        file: where they go, as steps 0, 1, 2, ... over all restarts.
    """

    sample_every = 5.0
    publish_every = 15.0

    def __init__(self, file: LinesFile) -> None:
        self.file = file
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; one that is still importing is left to itself."""
        self._closing.set()
        self._thread.join(timeout=1)

    def _work(self) -> None:
        monitors = _monitors()
        published = time.monotonic()
        while not self._closing.wait(self.sample_every):
            for monitor in monitors:
                monitor.collect_metrics()
            if time.monotonic() - published < self.publish_every:
                continue
            published = time.monotonic()
            metrics: dict[str, float] = {}
            for monitor in monitors:
                metrics |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            record = {f"system/{name}": value for name, value in metrics.items()}
            try:
                self.file.append({"step": self.file.next_step, **record})
                self.file.flush()
            except OSError:
                pass  # the store is away: these are lost, training goes on
            except LeaseLost:
                return


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    from pipelines.tracking.store import quiet_mlflow

    quiet_mlflow()
    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for gpu_monitor in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(gpu_monitor())
            break
        except Exception:
            continue  # no GPU of this make, or no library to ask it
    return monitors
