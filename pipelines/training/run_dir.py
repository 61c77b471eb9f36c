"""The run directory: what a training run leaves, and what lets it go on.

    config.yaml            the effective configuration of the first start
    run.json               fingerprints of the inputs, MLflow run id
    checkpoints/step_*/    see `pipelines.training.checkpoint`
    weights/               the final model (safetensors + config.json)
    metrics.jsonl          one line a logging period
    tracking.json, ...     what MLflow is filled from, see `pipelines.tracking.spool`
    events/*.json          one file an event: resumed, checkpoint_rejected, health findings, ...
    attempts/*.json        one file a start of the worker group, with its time books
    skips.json             data that a rollback skipped
    ray/                   what Ray keeps while it trains
    pulse/*.json           signs of life of the workers while they train
    report.json            where the time went, what to change, how it ended
    _lease/                which driver is at work, see `pipelines.lease`

Everything is one small atomic file, except metrics.jsonl, which has one writer at a time. A driver
that has lost the lease writes nothing, nor do its workers.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired

import yaml
from typing_extensions import TypedDict

from beit.weights import CONFIG_FILE, WEIGHTS_FILE
from pipelines import storage
from pipelines.config.checks import changed_fields, flatten, to_dict
from pipelines.errors import InputError, parsing
from pipelines.lease import Fence
from pipelines.records import Count, check_values, read_record, read_values, write_record
from pipelines.redaction import redacted_values
from pipelines.tracking.spool import Spool
from pipelines.training.goodput import Attempt

REMEDY = "restore it, or give another output or name for a new run"
FORGET = "remove it to go on without"


class RunRecord(TypedDict):
    """What must stand in run.json."""

    fingerprints: dict[str, Any]
    mlflow_run_id: str


class EventRecord(TypedDict):
    """What every event has; each kind adds its own."""

    event: str
    time: float
    message: NotRequired[str]


class Skip(TypedDict):
    """See `Skips`."""

    from_step: Count
    batches: Count


class SkipsRecord(TypedDict):
    """What must stand in skips.json."""

    entries: list[Skip]


class ReportRecord(TypedDict):
    """What must stand in report.json to tell of a finished run."""

    outcome: str
    message: str
    steps: Count
    last_period: dict[str, Any]
    goodput: dict[str, Any]


class RunDir:
    """Reads and writes one run directory."""

    def __init__(self, uri: str, fence: Fence | None = None) -> None:
        self.uri, self.fence = storage.absolute(uri), fence
        self.checkpoints = self.at("checkpoints")
        self.weights = self.at("weights")

    def at(self, *parts: str) -> str:
        """URI of something inside."""
        return storage.join(self.uri, *parts)

    def check(self) -> None:
        """Before each write. Raises LeaseLost when another driver has taken over."""
        if self.fence is not None:
            self.fence.check()

    def _write(self, values: Mapping[str, Any], *parts: str) -> None:
        write_record(self.at(*parts), values, check=self.check)

    def begin(
        self,
        config: Any,
        fingerprints: Mapping[str, Any],
        *,
        may_change: Sequence[str],
        mlflow_run_id: str = "",
    ) -> None:
        """Starts the directory, or checks that this is the run it holds.

        `config` is the stage's configuration; `may_change` names its fields and sections that may
        differ from the first start's; `mlflow_run_id` is the run that a new directory goes on with.

        Raises:
            InputError: a field or fingerprint differs from the first start; names all of them.
        """
        if self.holds(config, fingerprints, may_change=may_change):
            return
        text = yaml.safe_dump(redacted_values(to_dict(config)), sort_keys=False, allow_unicode=True)
        record = {"fingerprints": dict(fingerprints), "mlflow_run_id": mlflow_run_id}
        storage.write_bytes(self.at("config.yaml"), text.encode(), check=self.check)
        self._write(record, "run.json")

    def holds(
        self, config: Any, fingerprints: Mapping[str, Any], *, may_change: Sequence[str]
    ) -> bool:
        """Whether this run was begun. Raises InputError if another one was."""
        try:
            old = self._first_config()
            known = self.record()["fingerprints"]
        except (FileNotFoundError, NotADirectoryError):
            return False
        refuse_changes(self.uri, "another configuration", changed_fields(old, config, may_change))
        # Whose pixels were stored ones goes on with them.
        compared = fingerprints.keys() | ({"views"} & known.keys())
        changed = {
            f"fingerprint of {name}": (known.get(name), fingerprints.get(name))
            for name in sorted(compared)
            if known.get(name) != fingerprints.get(name)
        }
        refuse_changes(self.uri, "other data", changed)
        return True

    def _first_config(self) -> dict[str, Any]:
        path = self.at("config.yaml")
        data = storage.read_bytes(path)
        with parsing(path, REMEDY):
            config = dict(yaml.safe_load(data))
            flatten(config)  # a key that is no text is one that was damaged
            return config

    def record(self) -> dict[str, Any]:
        """run.json. Raises FileNotFoundError, or InputError if it is damaged."""
        return read_values(self.at("run.json"), RunRecord, REMEDY)

    def set_run_id(self, run_id: str) -> None:
        """Keeps the MLflow run id for the next start."""
        record = self.record()
        if run_id and run_id != record["mlflow_run_id"]:
            self._write({**record, "mlflow_run_id": run_id}, "run.json")

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event down."""
        now = time.time()
        event = {"event": kind, "time": now, **redacted_values(fields)}
        self._write(event, "events", f"{now:017.6f}-{kind}.json")

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """All events, or those of one kind, oldest first."""
        ending = f"-{kind}.json" if kind else ".json"
        return [
            read_values(self.at("events", file.path), EventRecord, FORGET)
            for file in storage.list_files(self.at("events"), ending)
        ]

    def attempts(self) -> list[Attempt]:
        """All starts of the worker group, oldest first."""
        records = [
            read_record(self.at("attempts", file.path), Attempt, FORGET)
            for file in storage.list_files(self.at("attempts"), ".json")
        ]
        return sorted(records, key=lambda attempt: attempt.number)

    def write_attempt(self, attempt: Attempt) -> None:
        """Creates or updates the record of an attempt."""
        name = f"{attempt.number:06d}.json"
        self._write(redacted_values(dataclasses.asdict(attempt)), "attempts", name)

    def skips(self) -> "Skips":
        """The data skipped so far."""
        path = self.at("skips.json")
        if not storage.exists(path):
            return Skips([])
        found = storage.read_json(path)
        if isinstance(found, list):  # as release 0.1.0 wrote them
            found = check_values({"entries": found}, SkipsRecord, path, REMEDY)
        else:
            found = read_values(path, SkipsRecord, REMEDY)
        return Skips(found["entries"])

    def write_skips(self, skips: "Skips") -> None:
        """Makes skips durable; to be done before the first step that uses them."""
        self._write({"entries": skips.entries}, "skips.json")

    def request_end(self) -> None:
        """Asks the workers to save and end."""
        now = {"time": time.time()}
        storage.write_json(self.at("end_requested.json"), now, check=self.check)

    def end_requested(self) -> bool:
        """Whether they were asked to."""
        return storage.exists(self.at("end_requested.json"))

    def forget_request(self) -> None:
        """Takes the request of an earlier start back."""
        self.check()
        storage.delete(self.at("end_requested.json"))

    def finished_report(self, total_steps: int) -> dict[str, Any] | None:
        """report.json of a run that has done so many steps and left its weights, or None.

        Whether it still has checkpoints does not matter: who needs room deletes those.
        """
        # A report is written however a launch ends; weights are the last thing a run makes.
        files = {file.path for file in storage.list_files(self.weights, recursive=False)}
        if not {CONFIG_FILE, WEIGHTS_FILE} <= files:
            return None
        try:
            report = read_values(self.at("report.json"), ReportRecord, FORGET)
        except FileNotFoundError:
            return None
        done = report["outcome"] == "finished" and report["steps"] == total_steps
        return report if done else None

    @contextlib.contextmanager
    def new_weights(self) -> Iterator[str]:
        """A local directory: what is in it afterwards becomes the final model."""
        with tempfile.TemporaryDirectory() as directory:
            yield directory
            storage.store_dir(directory, self.weights, last=CONFIG_FILE, check=self.check)

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Writes report.json."""
        self._write(redacted_values(dict(report)), "report.json")

    def remove(self) -> None:
        """Deletes all that a run keeps here, and nothing else."""
        self.check()
        for directory in ("checkpoints", "events", "attempts", "ray", "pulse"):
            storage.delete_prefix(self.at(directory))
        files = ("config.yaml", "run.json", "metrics.jsonl", "skips.json", "report.json")
        for name in (*files, "end_requested.json"):
            storage.delete(self.at(name))
        Spool(self.uri).remove()


def refuse_changes(uri: str, what: str, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises InputError naming everything that is not as it was when `uri` was started."""
    if changed:
        listed = "; ".join(f"{name}: {old!r} != {new!r}" for name, (old, new) in changed.items())
        raise InputError(
            f"{uri} was started with {what}: {listed}: undo the change, or give another output or "
            "name for a new run"
        )


class Skips:
    """From optimizer steps to positions in the order of samples.

    Without rollbacks step s takes batch s of the order. A rollback to step a that skips c batches
    adds c to every step from a on. Entries are never removed, so that a run continued from any
    checkpoint, also an older one, maps its steps alike.
    """

    def __init__(self, entries: Sequence[Mapping[str, int]]) -> None:
        self.entries = [dict(entry) for entry in entries]

    def position(self, step: int) -> int:
        """Batch of the order that this step takes."""
        return step + sum(e["batches"] for e in self.entries if e["from_step"] <= step)

    def add(self, *, from_step: int, batches: int) -> "Skips":
        """With `batches` more left out before `from_step`."""
        return Skips([*self.entries, {"from_step": from_step, "batches": batches}])

    def segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Steps [start, stop) as runs of consecutive positions: [(first position, count), ...]."""
        cuts = {e["from_step"] for e in self.entries if start < e["from_step"] < stop}
        edges = [start, *sorted(cuts), stop]
        return [(self.position(a), b - a) for a, b in itertools.pairwise(edges) if b > a]
