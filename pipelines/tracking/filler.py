"""From a spool to its MLflow run: all that is not there yet, each thing once.

It may be called at any time and any number of times, by the process that trains or by a later one:
what the run has already is asked for first.
"""

import datetime
import hashlib
import io
import logging
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipelines import storage
from pipelines.errors import printable
from pipelines.redaction import redacted, redacted_text
from pipelines.tracking.datasets import (
    INPUT_TAG,
    OUTPUT_TAG,
    TOKENIZER_TAG,
    dataset_digest,
    dataset_inputs,
    dataset_name,
)
from pipelines.tracking.model_card import update_versions
from pipelines.tracking.page import ERROR_TAG, MODEL_MISSING_TAG, PARENT_TAG, update_page
from pipelines.tracking.spool import LINES, OWN_WEIGHTS, Place, Spool, Values

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

HEARTBEAT_TAG = "beit.heartbeat"
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100  # what one request may carry
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 8000
# Answers that will not change by asking again.
FINAL_CODES = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}
# Pixels: what MLflow's page of a run has room for in a window of 1,440. It shows figures as they
# are, and wider ones push what stands beside the description out of the window. The pictures under
# "Model metrics" keep their size.
FIGURE_WIDTH = 700
# Bytes per second that an upload of weights may be as slow as.
SLOWEST_UPLOAD = 1e6


def metric_name(name: str) -> str:
    """`name` with every character that MLflow refuses in metric names made an underscore."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _shown(value: object, length: int) -> str:
    """Text for the database and for pages that show it."""
    return printable(redacted(str(value)), keep="\n\t")[:length]


class Filler:
    """Fills one MLflow run from one spool.

    Nothing is caught here, but for values that the server refuses for good: what could not be sent
    is sent by the next call.
    """

    def __init__(self, client: "MlflowClient", run_id: str, spool: Spool) -> None:
        self.client, self.run_id, self.spool = client, run_id, spool
        self.sent = {"values": 0, "pictures": 0, "files": 0}
        """How many of each this object has sent."""
        self.deadline = float("inf")
        """When, by the monotonic clock, whoever waits may give up; progress moves it on."""
        self.allowance = 0.0
        """Seconds that the upload of weights may take."""
        self.patience = 30.0
        self._done: set[Hashable] = set()
        self._files: dict[str, bytes] = {}
        self._known: dict[str, set[int]] | None = None
        self._seen_pictures: set[tuple[str, int]] = set()
        self._seen_events: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._places: dict[str, Place] = {}
        self._tags: dict[str, str] = {}

    def fill(self, *, final: bool = False) -> None:
        """Sends what is missing; with `final` also files, the model, and how the run ended."""
        first = self._known is None
        if first:
            self._begin()
        self._send_tags()
        self._send_values()
        self._send_pictures()
        if first or final:
            self._send_files(self.spool.files())
        if final:
            self._conclude()

    def beat(self) -> None:
        """Says that this run lives."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.client.set_tag(self.run_id, HEARTBEAT_TAG, now)

    def _progress(self, *what: Hashable, seconds: float = 0.0) -> None:
        """Moves the deadline on, once for each thing: after a refusal the same calls are made
        again, and what they repeat leads nowhere."""
        if what not in self._done:
            self._done.add(what)
            self.deadline = time.monotonic() + self.patience + seconds

    def _begin(self) -> None:
        run = self.client.get_run(self.run_id)
        record = self.spool.record()
        self._send_params(record.get("params", {}), run.data.params)
        inputs = dataset_inputs(record.get("inputs", []))
        if inputs:
            self.client.log_inputs(self.run_id, inputs)
        self._tags = dict(run.data.tags)
        parent = record.get("parent", "")
        if parent and self._has_run(parent):
            self._set_tags({PARENT_TAG: parent})
        self._seen_pictures = known_pictures(self.client, self.run_id)
        self._progress("pictures are known")
        known = {}
        for name in run.data.metrics:
            known[name] = {m.step for m in self.client.get_metric_history(self.run_id, name)}
            self._progress("values are known", name)
        self._known = known

    def _send_params(self, params: Mapping[str, Any], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        values = {name: _shown(value, MAX_PARAM_LENGTH) for name, value in params.items()}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS])
        # Parameters of a run never change; what a resumed run does differently is kept as tags.
        changed = {
            f"beit.resumed.{name}": value
            for name, value in values.items()
            if name in known and known[name] != value
        }
        self._set_tags(changed)

    def _send_tags(self) -> None:
        tags = {**_device_tags(self.spool), **self.spool.record().get("tags", {})}
        self._set_tags(tags)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        values = {name: _shown(value, MAX_TAG_LENGTH) for name, value in tags.items()}
        new = {name: value for name, value in values.items() if self._tags.get(name) != value}
        pairs = [RunTag(name, value) for name, value in new.items()]
        for start in range(0, len(pairs), MAX_TAGS):
            self.client.log_batch(self.run_id, tags=pairs[start : start + MAX_TAGS])
            self._progress("tags", start, *new.items())
        self._tags |= new

    def _send_values(self) -> None:
        sizes = {
            file.path: file.size
            for file in storage.list_files(self.spool.uri, ".jsonl", recursive=False)
        }
        for name in LINES:
            if name in sizes and sizes[name] != self._sizes.get(name):
                before = self._places.get(name, Place())
                values, place = self.spool.values_after(name, before, size=sizes[name])
                self._send(values)
                self._sizes[name], self._places[name] = sizes[name], place
        for name in self.spool.events():
            if name not in self._seen_events:
                self._send(self.spool.values_of_event(name))
                self._seen_events.add(name)

    def _send(self, values: Iterable[Values]) -> None:
        from mlflow.entities import Metric

        assert self._known is not None
        waiting: list[Metric] = []
        chosen: set[tuple[str, int]] = set()
        for one in values:
            for raw, value in one.metrics.items():
                name = metric_name(raw)
                if one.step in self._known.get(name, ()) or (name, one.step) in chosen:
                    continue
                chosen.add((name, one.step))
                waiting.append(Metric(name, value, one.timestamp, one.step))
        for start in range(0, len(waiting), MAX_METRICS):
            self._send_batch(waiting[start : start + MAX_METRICS])

    def _send_batch(self, metrics: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        assert self._known is not None
        try:
            self.client.log_batch(self.run_id, metrics)
        except MlflowException as error:
            if error.error_code not in FINAL_CODES or not self._has_run(self.run_id):
                raise
            log.warning("tracking: values refused for good: %s", redacted_text(str(error))[:300])
        for metric in metrics:
            self._known.setdefault(metric.key, set()).add(metric.step)
        self.sent["values"] += len(metrics)
        self._progress("values", self.sent["values"])

    def _has_run(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code not in FINAL_CODES:
                raise
            return False

    def _send_pictures(self) -> None:
        for key, step, uri in self.spool.pictures():
            name = metric_name(key)
            if (name, step) in self._seen_pictures:
                continue
            with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
                self.client.log_image(self.run_id, image, key=name, step=step)
            self._seen_pictures.add((name, step))
            self.sent["pictures"] += 1
            self._progress("picture", name, step)

    def _send_files(
        self, files: Mapping[str, str], change: Callable[[bytes], bytes] = bytes
    ) -> None:
        for name, uri in files.items():
            data = change(storage.read_bytes(uri))
            if self._files.get(name) == (digest := hashlib.sha256(data).digest()):
                continue
            directory, _, file_name = name.rpartition("/")
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary, file_name)
                path.write_bytes(data)
                self.client.log_artifact(self.run_id, str(path), directory or None)
            self._files[name] = digest
            self.sent["files"] += 1
            self._progress("file", name, digest)

    def _conclude(self) -> None:
        record = self.spool.record()
        self._send_files(self.spool.figures(), fitted)
        refusal = self._send_weights(record)
        self._set_or_delete(MODEL_MISSING_TAG, redacted_text(str(refusal or "")))
        self._send_judged(record)
        # One that is gone is of a failure that a later start has left behind, or that `beit sync`
        # has supposed.
        self._set_or_delete(ERROR_TAG, record.get("error", ""))
        update_page(self.client, self.run_id)
        status = record.get("status", "RUNNING")
        if status != "RUNNING":
            ended = int(1000 * record.get("ended", time.time()))
            self.client.set_terminated(self.run_id, status, end_time=ended)
        if refusal:
            raise refusal

    def _set_or_delete(self, tag: str, text: str) -> None:
        if text:
            self._set_tags({tag: text})
        elif tag in self.client.get_run(self.run_id).data.tags:
            self.client.delete_tag(self.run_id, tag)
            self._tags.pop(tag, None)

    def _send_weights(self, record: Mapping[str, Any]) -> Exception | None:
        """Why the store has no model of them, if it has not: a run ends as it ended all the same,
        for what one store refuses it may refuse for ever."""
        weights = record.get("weights")
        if not weights:
            return None
        from pipelines.tracking import model_registry  # and torch, which few stages need here

        # A record of an earlier version has the place of a run's own weights, without its secrets.
        own = self.spool.at(OWN_WEIGHTS)
        uri = own if weights["uri"] in (OWN_WEIGHTS, redacted(own)) else weights["uri"]
        self.allowance = sum(file.size for file in storage.list_files(uri)) / SLOWEST_UPLOAD
        self._progress("weights begin", seconds=self.allowance)
        try:
            model_id = model_registry.log_weights(
                self.client,
                self.run_id,
                uri,
                registered_model_name=weights["registered_model"],
            )
        except Exception as error:
            self._progress("weights are refused")  # and need no more time than other things
            return error
        told = (INPUT_TAG, OUTPUT_TAG, TOKENIZER_TAG)
        tags = {name: value for name, value in self._tags.items() if name.startswith(told)}
        self.client.set_logged_model_tags(model_id, tags)
        update_versions(self.client, self.run_id)
        self._progress("weights")
        return None

    def _send_judged(self, record: Mapping[str, Any]) -> None:
        """What this run found of its parent's weights, to the parent and its logged model."""
        from mlflow.entities import Metric

        parent, judged = self._tags.get(PARENT_TAG, ""), record.get("judged")
        if not parent or not judged:
            return
        if not self._has_run(parent):
            log.warning("tracking: run %s was deleted; it is not told what was found", parent)
            return
        # A fixed time: the same figures sent again are stored once.
        when, dataset = int(1000 * record["ended"]), judged["dataset"]
        source = {"dataset_name": dataset_name(dataset), "dataset_digest": dataset_digest(dataset)}
        outputs = self.client.get_run(parent).outputs
        models = outputs.model_outputs if outputs else []
        model = {"model_id": models[0].model_id} if models else {}
        metrics = [
            Metric(metric_name(name), value, when, 0, **source, **model)
            for name, value in judged["metrics"].items()
        ]
        self.client.log_batch(parent, metrics)
        update_page(self.client, parent)
        update_versions(self.client, parent)
        self._progress("judged")


def fitted(png: bytes) -> bytes:
    """A PNG file, made smaller where it is wider than `FIGURE_WIDTH`."""
    with Image.open(io.BytesIO(png)) as image:
        if image.width <= FIGURE_WIDTH:
            return png
        size = FIGURE_WIDTH, round(image.height * FIGURE_WIDTH / image.width)
        smaller = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, "PNG")
    return buffer.getvalue()


def _device_tags(spool: Spool) -> dict[str, str]:
    """What worker 0 computes on, from the newest record of a start."""
    found = storage.list_files(spool.at("attempts"), ".json")
    if not found:
        return {}
    attempt = storage.read_json(spool.at("attempts", found[-1].path))
    names = {"beit.device": "device", "beit.worker_host": "host", "beit.peak_tflops": "peak_tflops"}
    return {tag: str(attempt[name]) for tag, name in names.items() if attempt.get(name)}


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
