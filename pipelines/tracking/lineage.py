"""Walks between the runs that made an artefact and those that used it, by fingerprints in tags."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.tracking.datasets import INPUT_TAG, OUTPUT_TAG, STAGE_TAG
from pipelines.tracking.store import absolute_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity


@dataclass(frozen=True, kw_only=True)
class LineageNode:
    """A run and the runs behind its inputs."""

    run_id: str
    name: str
    stage: str
    status: str
    outputs: dict[str, str]
    """Kind -> fingerprint of what the run made."""
    uris: dict[str, str]
    """Kind -> where it was written."""
    inputs: dict[str, list[str]]
    """Kind -> fingerprints of what the run read."""
    rows: dict[str, int]
    """Fingerprint, as long as MLflow takes it -> rows, of the tables among the inputs."""
    parents: list["LineageNode"] = field(default_factory=list)
    """The runs that made the inputs, newest of several that made the same."""
    gaps: list[tuple[str, str]] = field(default_factory=list)
    """Kind and fingerprint of inputs that no run of the store made."""

    def walk(self) -> Iterator["LineageNode"]:
        """This node and all before it, each run once."""
        seen: set[str] = set()
        queue = [self]
        while queue:
            node = queue.pop(0)
            if node.run_id not in seen:
                seen.add(node.run_id)
                yield node
                queue.extend(node.parents)


def lineage(run_id: str, *, tracking_uri: str = "") -> LineageNode:
    """The run and, recursively, the finished runs that made what it read.

    Inputs that no run of the store made (made elsewhere, or with tracking off) end the walk; they
    are `gaps`.
    """
    from mlflow import MlflowClient

    client = MlflowClient(absolute_tracking_uri(tracking_uri))
    return node_of(client, client.get_run(run_id), {})


def users(kind: str, fingerprint: str, *, tracking_uri: str = "") -> list[LineageNode]:
    """The runs that read an artefact, newest first: who used this table, who evaluated these
    weights."""
    from mlflow import MlflowClient

    client = MlflowClient(absolute_tracking_uri(tracking_uri))
    known: dict[str, LineageNode] = {}
    return [node_of(client, run, known) for run in users_of(client, kind, fingerprint)]


def users_of(client: "MlflowClient", kind: str, fingerprint: str) -> "Sequence[MlflowEntity]":
    """The same as MLflow's runs."""
    # A run with several inputs of one kind has them in one tag.
    return search(client, f"tags.`{INPUT_TAG}{kind}` LIKE '%{fingerprint}%'")


def makers_of(client: "MlflowClient", kind: str, fingerprint: str) -> "Sequence[MlflowEntity]":
    """Runs that made an artefact, newest first."""
    return search(client, f"tags.`{OUTPUT_TAG}{kind}` = '{fingerprint}'")


def node_of(
    client: "MlflowClient", run: "MlflowEntity", known: dict[str, LineageNode]
) -> LineageNode:
    """The node of a run; `known` are those that were made already, and gets it."""
    run_id = run.info.run_id
    if run_id in known:
        return known[run_id]
    tags = run.data.tags
    made = _named(tags, OUTPUT_TAG)
    datasets = [one.dataset for one in run.inputs.dataset_inputs] if run.inputs else []
    node = LineageNode(
        run_id=run_id,
        name=run.info.run_name or "",
        stage=tags.get(STAGE_TAG, ""),
        status=run.info.status,
        inputs={
            kind: value.split(",")
            for kind, value in _named(tags, INPUT_TAG).items()
            # Of a fine-tuning that an earlier version began: no stage makes this kind, and one that
            # goes on has the table as an image table.
            if kind != "test_table"
        },
        outputs={kind: value for kind, value in made.items() if not kind.endswith(".uri")},
        uris={kind[:-4]: value for kind, value in made.items() if kind.endswith(".uri")},
        rows={one.digest: json.loads(one.profile)["num_rows"] for one in datasets if one.profile},
    )
    known[run_id] = node
    for kind, fingerprints in node.inputs.items():
        for fingerprint in fingerprints:
            makers = makers_of(client, kind, fingerprint)
            if not makers:
                node.gaps.append((kind, fingerprint))
            elif makers[0].info.run_id != run_id:
                node.parents.append(node_of(client, makers[0], known))
    return node


def _named(tags: dict[str, str], prefix: str) -> dict[str, str]:
    return {
        name.removeprefix(prefix): value
        for name, value in sorted(tags.items())
        if name.startswith(prefix)
    }


def search(client: "MlflowClient", condition: str) -> "Sequence[MlflowEntity]":
    """Runs of all experiments, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"]))
