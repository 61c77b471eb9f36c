"""MLflow runs: one for every job, made and ended by its driver, linked by fingerprints.

What a run has to say is written to files first (`spool`), and a thread fills MLflow from them
(`filler`): no stage waits for a server, and nothing is lost that a later call cannot send.

A run carries the fingerprints of what it read (`beit.input.image_table`, ...) and of what it made
(`beit.output.token_table`, ...) as tags, and the tables it read as MLflow dataset inputs. That is
enough to walk from images to token table to weights to evaluation and back (`lineage`).

MLflow is imported only when a run is started: its import takes seconds.
"""

import dataclasses
import json
import logging
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import yaml
from PIL import Image

from pipelines import storage
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, LeaseLost, printable
from pipelines.redaction import redacted, redacted_text, redacted_values
from pipelines.tracking import store as tracking_store
from pipelines.tracking.background import Background
from pipelines.tracking.context import context_tags
from pipelines.tracking.datasets import INPUT_TAG, OUTPUT_TAG, STAGE_TAG, TOKENIZER_TAG, Dataset
from pipelines.tracking.filler import Filler
from pipelines.tracking.page import OWN_NOTE_TAG
from pipelines.tracking.spool import OWN_WEIGHTS, LinesFile, Spool
from pipelines.tracking.system_metrics import SystemMetrics
from pipelines.tracking.table import (
    HEADLINE,
    HIGH,
    LOW,
    deciding,
    run_link,
    run_name,
    save_views,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "HEADLINE",
    "HIGH",
    "LOW",
    "TOKENIZER_TAG",
    "Dataset",
    "Run",
    "SpooledRun",
    "start_run",
]

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

FILL_EVERY, FILL_EVERY_REMOTE = 2.0, 20.0  # seconds; a remote spool is listed every time


class Run:
    """A run that records nothing: what stages get when tracking is off. See `SpooledRun`."""

    run_id = ""
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
        """Sets what the description of the run begins with, Markdown; see `page`."""

    def set_output(self, output: Dataset) -> None:
        """States what the run made, so that runs that use it can be linked to this one."""

    def judge(self, metrics: Mapping[str, float], dataset: Dataset) -> None:
        """States what this run found of the weights of its parent, on a data set: the parent and
        its logged model get it too."""

    def log_weights(self, weights_dir: str, *, registered_model_name: str = "") -> None:
        """Stores weights as an MLflow model, see `pipelines.tracking.model_registry`."""

    def finish(self, status: Status = "FINISHED", error: str = "") -> None:
        """Sends what waits and ends the run."""

    def leave(self) -> None:
        """Sends what waits; the run is somebody else's now."""

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
        if isinstance(error, LeaseLost):
            self.leave()
            return
        ended: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        self.finish(ended, f"{type(error).__name__}: {error}")


class SpooledRun(Run):
    """A run that is written to a spool, and from there to MLflow if `filler` is given.

    No method raises because of the server: a finished stage is worth more than its record.

    Args:
        spool: where it is written.
        filler: what fills MLflow.
        kept_at: where a spool that is a temporary directory is kept if MLflow lacks some of it;
            "": it is no temporary directory.
    """

    def __init__(
        self,
        spool: Spool,
        filler: Filler | None,
        *,
        kept_at: str = "",
        system_metrics: bool = False,
    ) -> None:
        self._spool, self._kept_at = spool, kept_at
        self._system: SystemMetrics | None = None
        self._lines: LinesFile | None = None
        self._finished = False
        self._background: Background | None = None
        if filler is None:
            return
        self.run_id = filler.run_id
        stored_in = str(spool.record()["stored_in"])
        self.url, self.where = _where(filler, stored_in)
        every = FILL_EVERY if storage.is_local(spool.uri) else FILL_EVERY_REMOTE
        self._background = Background(filler, every=every, shown=stored_in)
        if system_metrics:
            self._system = SystemMetrics(LinesFile(spool.at("system.jsonl")))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        values = {}
        for name, value in metrics.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError) as error:
                log.warning("tracking: %s of step %s not recorded: %s", name, step, error)
        if self._lines is None:
            self._lines = LinesFile(self._spool.at("driver.jsonl"), check=self._spool.check)
        self._lines.append({"step": int(step), **values})
        self._lines.flush()

    def log_image(self, key: str, image: Image.Image, step: int = 0) -> None:
        self._spool.picture(key, image, step)

    def log_artifact_file(self, name: str, data: bytes) -> None:
        self._spool.file(name, data)

    def log_table(self, name: str, columns: Mapping[str, Sequence[object]]) -> None:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self._spool.file(name, json.dumps({"columns": list(columns), "data": rows}).encode())
        tables = json.loads(self._spool.record()["tags"].get("mlflow.loggedArtifacts", "[]"))
        tables.append({"path": name, "type": "table"})
        self.set_tags({"mlflow.loggedArtifacts": json.dumps(tables)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._spool.update(tags={**self._spool.record()["tags"], **tags})

    def set_note(self, text: str) -> None:
        self.set_tags({OWN_NOTE_TAG: text})

    def set_output(self, output: Dataset) -> None:
        name = OUTPUT_TAG + output.name
        self.set_tags({name: output.digest, f"{name}.uri": output.uri})

    def judge(self, metrics: Mapping[str, float], dataset: Dataset) -> None:
        self.log_metrics(metrics)
        judged = {"metrics": dict(metrics), "dataset": dataclasses.asdict(dataset)}
        self._spool.update(judged=judged)

    def log_weights(self, weights_dir: str, *, registered_model_name: str = "") -> None:
        # A run's own by name: its place may hold what is taken out as a secret, and may change.
        own = weights_dir == self._spool.at(OWN_WEIGHTS)
        place = OWN_WEIGHTS if own else weights_dir
        weights = {"uri": place, "registered_model": registered_model_name}
        self._spool.update(weights=weights)

    def leave(self) -> None:
        self._finished = True
        if self._system:
            self._system.close()
        if self._background:
            self._background.close()
        if self._kept_at:
            shutil.rmtree(self._spool.uri, ignore_errors=True)

    def finish(self, status: Status = "FINISHED", error: str = "") -> None:
        if self._finished:
            return
        self._finished = True
        self._spool.update(status=status, error=error, ended=time.time())
        if self._system:
            self._system.close()
        if self._background is None:
            return
        complete = self._background.close()
        self._spool.update(complete=complete)
        kept = self._kept_at or self._spool.uri
        if not complete:
            log.warning(
                "tracking: %s does not have all of this run; what it has to say is kept, and "
                "`beit sync %s` sends it",
                self._background.shown,
                kept,
            )
        if self._kept_at:
            if not complete:
                storage.store_dir(self._spool.uri, kept)
            shutil.rmtree(self._spool.uri, ignore_errors=True)


def start_run(
    config: TrackingConfig,
    *,
    stage: str,
    params: Mapping[str, object],
    tags: Mapping[str, str] | None = None,
    inputs: Sequence[Dataset] = (),
    resume_run_id: str = "",
    parent_run_id: str = "",
    note: str = "",
    output: str = "",
    spool: str = "",
    check: Callable[[], None] = storage.unchecked,
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
        parent_run_id: the run that this one says something about, if the store has it.
        note: what the description begins with, Markdown.
        output: what the stage makes; beside it stands what could not be sent, until it is.
        spool: the directory of a training run, which keeps its own record, also with tracking off.
        check: called before each write there; raises where another driver has taken over.
        system_metrics: record the load of this machine. False where a worker does it.

    Raises:
        InputError: the URI cannot be used or no server answers.
    """
    if not config.enabled and not spool:
        return Run()
    tracking_uri = tracking_store.absolute_tracking_uri(config.uri) if config.enabled else ""
    client = tracking_store.connect(tracking_uri) if config.enabled else None
    temporary = "" if spool else tempfile.mkdtemp(prefix="beit-record-")
    kept_at = temporary and (storage.beside(output, ".record") if output else temporary + ".kept")
    files = Spool(spool or temporary, check)
    earlier = files.record()
    all_tags = {STAGE_TAG: stage, **(tags or {}), **input_tags(inputs)}
    if config.enabled:
        all_tags |= context_tags(stage, config.job_id)
    if note:
        all_tags[OWN_NOTE_TAG] = note
    files.update(
        stage=stage,
        name=printable(config.run_name or run_name(stage, params)),
        params={name: str(value) for name, value in deciding(stage, params).items()},
        parent=parent_run_id,
        tags={**earlier.get("tags", {}), **all_tags},
        inputs=[dataclasses.asdict(one) for one in inputs],
        status="RUNNING",
        error="",
        started=earlier.get("started", time.time()),
        # Earlier versions had the first step at 0: where one has sent some, the rest goes on so.
        curves_from=earlier.get("curves_from", 0 if earlier or resume_run_id else 1),
        complete=False,
        stored_in=redacted(tracking_uri),
    )
    if temporary:
        plain = redacted_values(json.loads(json.dumps(dict(params), default=str)))
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        files.file("config.yaml", text.encode())
    if client is None:
        return SpooledRun(files, None)
    run_id = opened_run(client, config, tracking_uri, files, resume_run_id)
    files.update(run_id=run_id)
    filler = Filler(client, run_id, files)
    run = SpooledRun(files, filler, kept_at=kept_at, system_metrics=system_metrics)
    print(run.where, file=sys.stderr)
    return run


def opened_run(
    client: "MlflowClient", config: TrackingConfig, tracking_uri: str, spool: Spool, run_id: str
) -> str:
    """The run of this id set running, or a new one of what the spool tells. Raises InputError."""
    try:
        if run_id and tracking_store.has_run(client, run_id):
            client.update_run(run_id, status="RUNNING")
            return run_id
        record = spool.record()
        experiment_id = tracking_store.experiment_id(client, config, tracking_uri)
        save_views(client, experiment_id)
        begun = int(1000 * record["started"])
        run = client.create_run(experiment_id, begun, run_name=record["name"])
        return str(run.info.run_id)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"tracking.uri: no run could be made in {redacted(tracking_uri)!r} "
            f"({redacted_text(str(error))}); or pass --tracking.enabled false"
        ) from error


def _where(filler: Filler, stored_in: str) -> tuple[str, str]:
    """Address of a run's page, if there is a server, and what is said of it."""
    if not stored_in.startswith("http"):
        show = f"beit ui --uri {shlex.quote(stored_in)}"
        return "", f"MLflow run {filler.run_id[:8]} in {stored_in}: `{show}` shows it"
    number = filler.client.get_run(filler.run_id).info.experiment_id
    url = run_link(stored_in, number, filler.run_id)
    return url, f"MLflow run: {url}"


def input_tags(inputs: Sequence[Dataset]) -> dict[str, str]:
    """Fingerprints of what a run reads, by kind."""
    digests: dict[str, list[str]] = {}
    for dataset in inputs:
        digests.setdefault(INPUT_TAG + dataset.name, []).append(dataset.digest)
    tags = {name: ",".join(values) for name, values in digests.items()}
    tokenizer = tags.get(f"{INPUT_TAG}tokenizer")
    return tags | {TOKENIZER_TAG: tokenizer} if tokenizer else tags
