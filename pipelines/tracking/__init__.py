"""MLflow runs: one for every job, made and ended by its driver, linked by fingerprints.

A run carries the fingerprints of what it read (`beit.input.image_table`, ...) and of what it made
(`beit.output.token_table`, ...) as tags, and the tables it read as MLflow dataset inputs. That is
enough to walk from images to token table to weights to evaluation and back (`lineage`).

MLflow is imported only when a run is started: its import takes seconds.
"""

import contextlib
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from PIL import Image

from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.redaction import redacted
from pipelines.tracking import store as tracking_store
from pipelines.tracking.metric_logger import MetricLogger, quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Dataset", "MetricLogger", "MlflowRun", "Run", "disabled", "start_run"]

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

INPUT_TAG, OUTPUT_TAG, STAGE_TAG = "beit.input.", "beit.output.", "beit.stage"
NOTE_TAG, ERROR_TAG = "mlflow.note.content", tracking_store.ERROR_TAG
TABLES = ("image_table", "token_table")
MAX_PARAMS_PER_BATCH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_DIGEST_LENGTH = 100, 6000, 8000, 36


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An artefact that a stage reads or writes."""

    name: str
    """Its kind: image_table, token_table, tokenizer or weights."""
    uri: str
    digest: str
    """Its fingerprint."""
    context: str = ""
    """What it is used for: training, evaluation, ..."""


class Run:
    """A run that records nothing: what stages get when tracking is off. See `MlflowRun`."""

    run_id = ""
    tracking_uri = ""
    url = ""
    where = "tracking is off"

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Records values of one step; returns at once."""

    def log_image(self, key: str, image: Image.Image, step: int = 0) -> None:
        """Records a picture under a key, with a slider over its steps; returns at once."""

    def log_artifact_file(self, name: str, data: bytes) -> None:
        """Stores a file; `name` may contain directories."""

    def log_table(self, name: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Stores a table that the interface shows as one; `name` ends in .json."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""

    def set_note(self, text: str) -> None:
        """Sets the description of the run, Markdown."""

    def set_output(self, output: Dataset) -> None:
        """States what the run made, so that runs that use it can be linked to this one."""

    def log_weights(self, weights_dir: str, *, registered_model_name: str = "") -> None:
        """Stores weights as an MLflow model, see `pipelines.tracking.model_registry`."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Sends what waits and ends the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish("FINISHED")
            return
        self.set_tags({ERROR_TAG: f"{type(error).__name__}: {error}"})
        self.finish("FAILED" if isinstance(error, Exception) else "KILLED")


def disabled() -> Run:
    """A run that records nothing."""
    return Run()


class MlflowRun(Run):
    """A run in MLflow, owned by the driver of a stage.

    No method raises because of the server: a finished stage is worth more than its record.
    What could not be stored is told in the log.
    """

    def __init__(
        self, client: "MlflowClient", tracking_uri: str, run_id: str, *, system_metrics: bool
    ) -> None:
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self._client = client
        self._experiment_id = str(client.get_run(run_id).info.experiment_id)
        self._logger = MetricLogger(tracking_uri, run_id, system_metrics=system_metrics)
        self._finished = False
        shown = redacted(tracking_uri)
        if tracking_uri.startswith("http"):
            # Without this switch MLflow opens its view for language-model traces.
            self.url = (
                f"{shown.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{run_id}"
                "?workflowType=machine_learning"
            )
            self.where = f"MLflow run: {self.url}"
        else:
            self.url = ""
            self.where = (
                f"MLflow run {run_id[:8]} in {shown}: `make ui` shows it "
                f"(mlflow ui --backend-store-uri {shown})"
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self._logger.log(metrics, step)

    def log_image(self, key: str, image: Image.Image, step: int = 0) -> None:
        self._logger.log_image(key, image, step)

    def log_artifact_file(self, name: str, data: bytes) -> None:
        directory, _, file_name = name.rpartition("/")
        with self._guard(name), tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, file_name)
            path.write_bytes(data)
            self._client.log_artifact(self.run_id, str(path), directory or None)

    def log_table(self, name: str, columns: Mapping[str, Sequence[object]]) -> None:
        with self._guard(name):
            self._client.log_table(self.run_id, {key: [*v] for key, v in columns.items()}, name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        with self._guard("tags"):
            values = [
                RunTag(name, redacted(value)[:MAX_TAG_LENGTH]) for name, value in tags.items()
            ]
            self._client.log_batch(self.run_id, tags=values)

    def set_note(self, text: str) -> None:
        self.set_tags({NOTE_TAG: text})

    def set_output(self, output: Dataset) -> None:
        name = OUTPUT_TAG + output.name
        self.set_tags({name: output.digest, f"{name}.uri": output.uri})

    def log_weights(self, weights_dir: str, *, registered_model_name: str = "") -> None:
        from pipelines.tracking import model_registry

        with self._guard("weights"):
            model_registry.log_weights(
                self._client, self.run_id, weights_dir, registered_model_name=registered_model_name
            )

    def finish(self, status: Status = "FINISHED") -> None:
        if self._finished:
            return
        self._finished = True
        self._logger.close()
        if self._logger.dropped:
            self.set_tags({"beit.dropped_records": str(self._logger.dropped)})
        with self._guard("the status"):
            self._client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            store, reason = redacted(self.tracking_uri), redacted(str(error))
            log.warning("tracking: %s could not be stored in %s: %s", what, store, reason)


def start_run(
    config: TrackingConfig,
    *,
    stage: str,
    params: Mapping[str, object],
    tags: Mapping[str, str] | None = None,
    inputs: Sequence[Dataset] = (),
    resume_run_id: str | None = None,
    note: str = "",
    system_metrics: bool = True,
) -> Run:
    """Starts the run of a stage, or goes on with one, and prints where to see it.

    Args:
        config: where to record.
        stage: name of the stage, as in `beit STAGE`.
        params: the effective configuration, flat.
        tags: further tags.
        inputs: what the stage reads; kinds and fingerprints become tags, tables become datasets.
        resume_run_id: the run of an interrupted earlier try. A run that the store does not know
            any more is replaced by a new one.
        note: description of the run, Markdown.
        system_metrics: record the machine's load from here. A stage whose work happens in a
            worker passes False and lets the worker's `MetricLogger` do it.

    Raises:
        InputError: the URI cannot be used or no server answers.
    """
    if not config.enabled:
        return disabled()
    tracking_uri = tracking_store.absolute_tracking_uri(config.uri)
    quiet_mlflow()
    client = tracking_store.connect(tracking_uri)
    try:
        run_id = tracking_store.reopened(client, resume_run_id) if resume_run_id else ""
        if not run_id:
            experiment_id = tracking_store.experiment_id(client, config, tracking_uri)
            name = config.run_name or f"{stage} {time.strftime('%Y-%m-%d %H:%M:%S')}"
            run_id = client.create_run(experiment_id, run_name=name).info.run_id
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"tracking.uri: no run could be made in {redacted(tracking_uri)!r} "
            f"({redacted(str(error))}); or pass --tracking.enabled false"
        ) from error
    run = MlflowRun(client, tracking_uri, run_id, system_metrics=system_metrics)
    all_tags = {**_context_tags(stage), STAGE_TAG: stage, **(tags or {}), **_input_tags(inputs)}
    run.set_tags({**all_tags, NOTE_TAG: note} if note else all_tags)
    with run._guard("the configuration"):
        _log_params(client, run_id, params)
    with run._guard("dataset inputs"):
        _log_datasets(client, run_id, inputs)
    print(run.where, file=sys.stderr)
    return run


def _context_tags(stage: str) -> dict[str, str]:
    from mlflow.tracking.context.registry import resolve_tags

    # MLflow finds user and commit; the program's name would be that of the launcher.
    return {**resolve_tags(), "mlflow.source.name": f"beit {stage}"}


def _input_tags(inputs: Sequence[Dataset]) -> dict[str, str]:
    digests: dict[str, list[str]] = {}
    for dataset in inputs:
        digests.setdefault(INPUT_TAG + dataset.name, []).append(dataset.digest)
    return {name: ",".join(values) for name, values in digests.items()}


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, object]) -> None:
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    values = {name: redacted(str(value))[:MAX_PARAM_LENGTH] for name, value in params.items()}
    new = [Param(name, value) for name, value in values.items() if name not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_BATCH])
    # Parameters of a run never change; what a resumed run does differently is kept as tags.
    changed = [
        RunTag(f"beit.resumed.{name}", value)
        for name, value in values.items()
        if name in known and known[name] != value
    ]
    for start in range(0, len(changed), MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=changed[start : start + MAX_PARAMS_PER_BATCH])


def _log_datasets(client: "MlflowClient", run_id: str, inputs: Sequence[Dataset]) -> None:
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    datasets = []
    for dataset in inputs:
        if dataset.name not in TABLES:
            continue
        with warnings.catch_warnings():
            # MLflow warns that a local path could be read by each of two equal readers.
            warnings.simplefilter("ignore")
            source = resolve_dataset_source(dataset.uri)
        digest = dataset.digest[:MAX_DIGEST_LENGTH]
        meta = MetaDataset(source=source, name=dataset.name, digest=digest)
        tags = [InputTag("mlflow.data.context", dataset.context)] if dataset.context else []
        datasets.append(DatasetInput(meta._to_mlflow_entity(), tags))
    if datasets:
        client.log_inputs(run_id, datasets)
