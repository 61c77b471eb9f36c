"""Metrics and pictures to MLflow from a background thread that never disturbs training.

Values wait in a bounded buffer. A server that is away makes the thread pause for longer and
longer; meanwhile the buffer thins itself out, and the number of values lost is counted and told.
After a restart, values that the run already has are left out: the same run goes on, and no step
is recorded twice.
"""

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipelines.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MAX_METRICS_PER_BATCH = 1000  # what one MLflow request may carry
MAX_PAUSE = 60.0
MAX_IMPORT = 180.0
# Answers that will not change by asking again.
FINAL_CODES = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    metrics: dict[str, float]
    step: int
    timestamp: int


@dataclass(frozen=True, kw_only=True)
class _Picture:
    key: str
    image: Image.Image
    step: int


def quiet_mlflow() -> None:
    """Keeps the notes that MLflow writes about its own tables and requests off the terminal."""
    for name in ("mlflow", "alembic", "mlflow.store.db.utils", "mlflow.tracking", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def metric_name(name: str) -> str:
    """`name` with every character that MLflow refuses in metric names made an underscore."""
    return re.sub(r"[^\w\-. /]", "_", name)


class MetricLogger:
    """Logs to one MLflow run from a background thread; made in the process that uses it.

    `log`, `log_image` and `close` never raise, and the first two never wait for the server.
    Without a `run_id` nothing is done, so that callers need no case for tracking switched off.

    Args:
        tracking_uri: MLflow tracking URI.
        run_id: the run, made by the driver.
        system_metrics: also record processor, memory, network, disk and GPU use of this machine.
        capacity: how many calls of `log` may wait for the server.
        flush_every: seconds between two requests.
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        *,
        system_metrics: bool = False,
        capacity: int = 4096,
        image_capacity: int = 16,
        flush_every: float = 2.0,
    ) -> None:
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.shown = redacted(tracking_uri)
        self.dropped = 0
        self._capacity, self._flush_every = capacity, flush_every
        self._entries: list[_Entry] = []
        self._sending: list[_Entry] = []
        self._pictures: deque[_Picture] = deque()
        self._image_capacity = image_capacity
        self._last_steps: dict[str, int] = {}
        self._known_pictures: set[tuple[str, int]] | None = None
        self._client: MlflowClient | None = None
        self._away = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._imported = threading.Event()
        self._sampler = _SystemSampler() if system_metrics and run_id else None
        self._thread: threading.Thread | None = None
        if run_id:
            self._thread = threading.Thread(target=self._work, name="metric-logger", daemon=True)
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records values of one step; those of a step that a metric already passed are left out."""
        if self._thread is None:
            return
        try:
            values = {metric_name(name): float(value) for name, value in metrics.items()}
            entry = _Entry(metrics=values, step=int(step), timestamp=int(time.time() * 1000))
        except (TypeError, ValueError) as error:
            log.warning("tracking: step %s not recorded: %s", step, error)
            self.dropped += 1
            return
        with self._lock:
            self._entries.append(entry)
            if len(self._entries) > self._capacity:
                self._thin_out()

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        """Records a picture; the interface of MLflow shows all steps of a key with a slider."""
        if self._thread is None:
            return
        with self._lock:
            self._pictures.append(_Picture(key=key, image=image, step=int(step)))
            if len(self._pictures) > self._image_capacity:
                self._pictures.popleft()
                self.dropped += 1

    def close(self, timeout: float = 30.0) -> None:
        """Sends what waits, for at most `timeout` seconds, and ends the thread.

        The import of MLflow, tens of seconds on a busy machine, does not count: a short stage
        may end before it is through.
        """
        if self._thread is None:
            return
        self._closing.set()
        self._wake.set()
        self._imported.wait(MAX_IMPORT)
        self._thread.join(timeout)
        with self._lock:
            left = len(self._entries) + len(self._sending) + len(self._pictures)
        if left:
            self.dropped += left
            log.warning("tracking: %s did not answer; %d records lost", self.shown, left)
        self._thread = None

    def _thin_out(self) -> None:
        # Every second entry of the most frequent kind goes: curves keep their shape, and rare
        # entries (a probe's result) stay.
        kinds = Counter(tuple(entry.metrics) for entry in self._entries)
        frequent = kinds.most_common(1)[0][0]
        kept, keep_next = [], True
        for entry in self._entries:
            if tuple(entry.metrics) == frequent:
                keep_next = not keep_next
                if keep_next:
                    self.dropped += 1
                    continue
            kept.append(entry)
        self._entries = kept[-self._capacity :]

    # Everything below runs in the background thread.

    def _work(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause or self._flush_every)
            closing = self._closing.is_set()
            try:
                if self._sampler and (metrics := self._sampler.sample()):
                    self._sample_to_entries(metrics)
                self._send_all()
                pause = 0.0
                if self._away:
                    self._away = False
                    log.warning("tracking: %s is back", self.shown)
            except Exception as error:
                pause = min(MAX_PAUSE, max(1.0, 2 * pause))
                if not self._away:
                    self._away = True
                    log.warning(
                        "tracking: %s does not take metrics (%s); training goes on, values wait",
                        self.shown,
                        redacted(str(error)).splitlines()[0][:200]
                        if str(error)
                        else type(error).__name__,
                    )
            if closing:
                if not (self._entries or self._sending or self._pictures):
                    return
                time.sleep(0.2)

    def _sample_to_entries(self, metrics: dict[str, float]) -> None:
        assert self._sampler
        # The step goes on where the run's last sample was, which is known once it was read.
        if self._client is not None:
            step = 1 + max((self._last_steps.get(name, -1) for name in metrics), default=-1)
            self.log(metrics, max(step, self._sampler.next_step))
            self._sampler.next_step = max(step, self._sampler.next_step) + 1

    def _connect(self) -> "MlflowClient":
        if self._client is None:
            try:
                from mlflow import MlflowClient
                from mlflow.exceptions import MlflowException
            finally:
                self._imported.set()
            quiet_mlflow()
            client = MlflowClient(self.tracking_uri)
            try:
                self._last_steps = last_steps(client, self.run_id)
            except MlflowException as error:
                # A run that is gone refuses the values too, which counts and tells them.
                if error.error_code not in FINAL_CODES:
                    raise
            self._client = client
        return self._client

    def _send_all(self) -> None:
        client = self._connect()
        while True:
            if not self._sending:
                with self._lock:
                    self._take_batch()
                if not self._sending:
                    break
            self._send_metrics(client)
        while self._pictures:
            self._send_picture(client, self._pictures[0])

    def _take_batch(self) -> None:
        count = 0
        for taken, entry in enumerate(self._entries):
            count += len(entry.metrics)
            if count > MAX_METRICS_PER_BATCH and taken:
                self._sending, self._entries = self._entries[:taken], self._entries[taken:]
                return
        self._sending, self._entries = self._entries, []

    def _send_metrics(self, client: "MlflowClient") -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        last = dict(self._last_steps)
        metrics = []
        for entry in self._sending:
            for name, value in entry.metrics.items():
                if entry.step > last.get(name, -1):
                    last[name] = entry.step
                    metrics.append(Metric(name, value, entry.timestamp, entry.step))
        try:
            # A request repeated after a lost answer is harmless: equal rows are stored once.
            for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics[start : start + MAX_METRICS_PER_BATCH])
        except MlflowException as error:
            if error.error_code not in FINAL_CODES:
                raise
            self.dropped += len(self._sending)
            log.warning("tracking: values refused for good: %s", str(error)[:300])
        self._last_steps = last
        self._sending = []

    def _send_picture(self, client: "MlflowClient", picture: _Picture) -> None:
        from mlflow.exceptions import MlflowException

        if self._known_pictures is None:
            self._known_pictures = known_pictures(client, self.run_id)
        key = metric_name(picture.key)
        if (key, picture.step) not in self._known_pictures:
            try:
                client.log_image(self.run_id, picture.image, key=key, step=picture.step)
            except (TypeError, ValueError, MlflowException) as error:
                if getattr(error, "error_code", "BAD_REQUEST") not in FINAL_CODES:
                    raise
                self.dropped += 1
                log.warning("tracking: picture %s refused: %s", key, str(error)[:300])
            self._known_pictures.add((key, picture.step))
        with self._lock:
            # The buffer may have dropped it meanwhile to make room.
            if self._pictures and self._pictures[0] is picture:
                self._pictures.popleft()


def last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The largest step that every metric of a run has."""
    data = client.get_run(run_id).data
    # The latest values come with their steps in one answer, but only privately; the public way
    # reads each metric's whole history.
    objects = getattr(data, "_metric_objs", None)
    if objects is not None:
        return {metric.key: metric.step for metric in objects}
    return {
        name: max(metric.step for metric in client.get_metric_history(run_id, name))
        for name in data.metrics
    }


def known_pictures(client: "MlflowClient", run_id: str) -> set[tuple[str, int]]:
    """Key and step of every picture that a run has, from MLflow's names of the files.

    A picture is two files; the compressed one is written last.
    """
    found = set()
    for file in client.list_artifacts(run_id, "images"):
        match = re.fullmatch(r"images/(.+?)\+step\+(\d+)\+.*\+compressed\.webp", file.path)
        if match:
            found.add((match[1].replace("~", "/"), int(match[2])))
    return found


class _SystemSampler:
    """MLflow's own system metrics, sampled every few seconds and averaged, without its thread.

    MLflow's monitor asks the server for the run before every sample, stops for ever at the first
    failure, and waits without limit at the end.
    """

    sample_every = 5.0
    publish_every = 15.0

    def __init__(self) -> None:
        self.next_step = 0
        self._monitors: list[Any] | None = None
        self._sampled = self._published = time.monotonic()

    def sample(self) -> dict[str, float]:
        """Takes a sample when it is time; returns averages when it is time for them, else {}."""
        now = time.monotonic()
        if self._monitors is None:
            self._monitors = self._make_monitors()
        if now - self._sampled < self.sample_every:
            return {}
        self._sampled = now
        for monitor in self._monitors:
            monitor.collect_metrics()
        if now - self._published < self.publish_every:
            return {}
        self._published = now
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in metrics.items()}

    @staticmethod
    def _make_monitors() -> list[Any]:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        quiet_mlflow()
        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for gpu_monitor in (GPUMonitor, ROCMMonitor):
            try:
                monitors.append(gpu_monitor())
                break
            except Exception:
                continue  # no GPU of this make, or no library to ask it
        return monitors
