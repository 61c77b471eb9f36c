"""What MLflow knows of runs that are to be compared."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipelines import storage
from pipelines.config.checks import filled_record, flatten
from pipelines.config.evaluate import MAY_CHANGE, EvaluateConfig
from pipelines.config.finetune import FinetuneConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.errors import InputError
from pipelines.tracking.datasets import STAGE_TAG
from pipelines.tracking.lineage import LineageNode, node_of
from pipelines.tracking.page import FIGURES, evaluations_of
from pipelines.tracking.table import HEADLINE, HIGH, LOW, renamed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Fields that say where and how something runs, and with what seed: not what is compared.
NO_SETTING = (
    "output", "name", "seed", "tracking", "log_every", "pictures_every", "checkpoint", "probe",
    "health", "lease",
)  # fmt: skip
# Of stages whose runs keep their configuration.
KINDS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "train-tokenizer": TrainTokenizerConfig,
}
MAX_POINTS = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """What is needed to compare two evaluations image by image."""

    hits: np.ndarray
    """Bool (n,): which test images the linear probe got right."""
    groups: np.ndarray
    """Int (n,): images of one group are near-duplicates."""
    seed: int
    """Of the protocol."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """An evaluation of a run."""

    accuracy: float
    low: float
    high: float
    """95 % interval over groups of images."""
    pairing: Pairing | None
    """None where it was not kept."""
    identity: str
    """Equal for evaluations of the same images by the same protocol."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """One run."""

    run_id: str
    name: str
    status: str
    config: dict[str, Any]
    """Flat; of a run of an earlier version with what it did where later ones have a field."""
    curves: dict[str, tuple[list[int], list[float]]]
    """Metric -> steps, values."""
    judgement: Judgement | None
    pictures: dict[str, bytes]
    """PNG files by name."""
    node: LineageNode
    cost: dict[str, float]
    """device_hours, images, gigabytes: those that are known."""

    @property
    def setting(self) -> str:
        """Equal for runs that differ in their seed only."""
        kept = {
            name: value
            for name, value in self.config.items()
            if name not in NO_SETTING and name.partition(".")[0] not in NO_SETTING
        }
        return json.dumps(kept, sort_keys=True, default=str)


def chosen_runs(
    client: "MlflowClient", asked: Sequence[str], experiment: str, max_runs: int
) -> "list[Run]":
    """The runs that are meant, each once, in the order in which they are named.

    Raises:
        InputError: one is unknown, or there are more than `max_runs`, or none.
    """
    found: dict[str, Run] = {}
    for name in asked:
        for one in _runs_of(client, name, experiment):
            found.setdefault(one.info.run_id, one)
    if not found:
        raise InputError(f"runs = {list(asked)}: no such run; give run directories or run ids")
    if len(found) > max_runs:
        raise InputError(
            f"runs = {list(asked)}: {len(found)} runs, max_runs = {max_runs}; ask for fewer, or "
            "raise it"
        )
    return list(found.values())


def _runs_of(client: "MlflowClient", name: str, experiment: str) -> "list[Run]":
    from mlflow.exceptions import MlflowException

    record = storage.join(storage.absolute(name), "run.json") if _is_place(name) else ""
    try:
        if record and storage.exists(record):
            return [client.get_run(storage.read_json(record)["mlflow_run_id"])]
        if len(name) == 32 and name.isalnum():
            return [client.get_run(name)]
        if name.startswith("experiment:"):
            return _search(
                client, name.removeprefix("experiment:"), "tags.`beit.stage` = 'pretrain'"
            )
        if not record and ("=" in name or ">" in name or "<" in name):
            return _search(client, experiment, name)
    except MlflowException as error:
        raise InputError(f"runs: {name!r}: {error}") from error
    raise InputError(
        f"runs: {name!r} is no run directory with a record in MLflow, no run id, no "
        "experiment:NAME and no query"
    )


def _is_place(name: str) -> bool:
    # The options of a URI have the marks of a query, too.
    is_uri = re.match(r"\w+://[^\s'`]+$", name) is not None
    return is_uri or (not name.startswith("experiment:") and not set("='<>`") & set(name))


def _search(client: "MlflowClient", experiment: str, condition: str) -> "list[Run]":
    known = client.get_experiment_by_name(experiment)
    if known is None:
        raise InputError(f"tracking.experiment: there is no {experiment!r} in this store")
    return list(
        client.search_runs([known.experiment_id], condition, order_by=["attributes.start_time ASC"])
    )


def facts_of(client: "MlflowClient", run: "Run", metrics: Sequence[str]) -> Facts:
    """All that the report shows of a run."""
    run_id = run.info.run_id
    files = {file.path for file in client.list_artifacts(run_id)}
    config = yaml.safe_load(_file(client, run_id, "config.yaml")) if "config.yaml" in files else {}
    report = json.loads(_file(client, run_id, "report.json")) if "report.json" in files else {}
    judged = evaluations_of(client, run)
    kind = KINDS.get(run.data.tags.get(STAGE_TAG, ""))
    return Facts(
        run_id=run_id,
        name=run.info.run_name or run_id[:8],
        status=run.info.status,
        config=filled_record(kind, config) if kind and config else flatten(run.data.params),
        curves={name: _curve(client, run_id, name) for name in metrics if name in run.data.metrics},
        judgement=_judgement(client, judged[0]) if judged else None,
        pictures={
            file.path.rpartition("/")[2]: _file(client, run_id, file.path)
            for file in client.list_artifacts(run_id, FIGURES)
        },
        node=node_of(client, run, {}),
        cost=_cost(run, flatten(config), report),
    )


def _file(client: "MlflowClient", run_id: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return Path(client.download_artifacts(run_id, name, directory)).read_bytes()


def _curve(client: "MlflowClient", run_id: str, name: str) -> tuple[list[int], list[float]]:
    points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
    # First and last stay, and so do the best values, which the table names.
    every = -(-len(points) // MAX_POINTS)
    values = [value for _, value in points]
    extremes = {values.index(min(values)), values.index(max(values)), len(points) - 1}
    kept = [p for index, p in enumerate(points) if index % every == 0 or index in extremes]
    return [step for step, _ in kept], [value for _, value in kept]


def _judgement(client: "MlflowClient", run: "Run") -> Judgement:
    values, run_id = renamed(run.data.metrics), run.info.run_id
    files = {file.path for file in client.list_artifacts(run_id)}
    pairing = None
    identity: dict[str, Any] = {}
    if "evaluation.json" in files:
        report = json.loads(_file(client, run_id, "evaluation.json"))
        identity = dict(report["identity"])
        # An evaluation of an earlier version did what later ones have a field for by default.
        options = filled_record(
            EvaluateConfig, {"run": "", "images": "", **identity.pop("options", {})}
        )
        # What is no part of the linear probe; of tables the fingerprints stay.
        for name in ("weights", "baseline", "teacher", "attentive", "baselines", "test_images"):
            identity.pop(name, None)
            options.pop(name, None)
        identity["options"] = {
            name: value
            for name, value in options.items()
            if name.partition(".")[0] not in MAY_CHANGE
        }
        identity["left_out"] = report.get("damaged", [])
    if "hits.json" in files:
        kept = json.loads(_file(client, run_id, "hits.json"))
        pairing = Pairing(
            hits=np.array(list(kept["linear"])) == "1",
            groups=np.array(kept["groups"]),
            seed=identity["options"]["seed"] if identity else 0,
        )
    return Judgement(
        accuracy=values[HEADLINE],
        low=values[LOW],
        high=values[HIGH],
        pairing=pairing,
        identity=json.dumps(identity, sort_keys=True),
    )


def _cost(run: "Run", config: dict[str, Any], report: dict[str, Any]) -> dict[str, float]:
    cost: dict[str, float] = {}
    if "goodput" in report:
        workers = config.get("scaling.num_workers") or 1
        most = max(workers) if isinstance(workers, list) else max(int(workers), 1)
        cost["device_hours"] = most * report["goodput"]["wall_seconds"] / 3600
        cost["images"] = float(report["steps"] * config.get("data.global_batch_size", 0))
    where = run.data.tags.get("beit.run_dir", "")
    try:
        sizes = [file.size for file in storage.list_files(where)] if where else []
    except (OSError, InputError):  # another machine's disk
        sizes = []
    return cost | ({"gigabytes": sum(sizes) / 1e9} if sizes else {})
