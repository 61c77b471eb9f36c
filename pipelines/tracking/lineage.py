"""Walks from a run to the runs that made what it read, by the fingerprints in their tags."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.tracking import INPUT_TAG, OUTPUT_TAG, STAGE_TAG
from pipelines.tracking.store import absolute_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity


@dataclass(frozen=True, kw_only=True)
class LineageNode:
    """A run and the runs behind its inputs."""

    run_id: str
    stage: str
    status: str
    outputs: dict[str, str]
    """Kind -> fingerprint of what the run made."""
    inputs: dict[str, list[str]]
    """Kind -> fingerprints of what the run read."""
    parents: list["LineageNode"] = field(default_factory=list)
    """The runs that made the inputs, newest of several that made the same."""

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

    Inputs that no run of the store made (imported, or made with tracking off) end the walk; they
    are still named in `inputs`.
    """
    from mlflow import MlflowClient

    client = MlflowClient(absolute_tracking_uri(tracking_uri))
    return _node(client, client.get_run(run_id), {})


def users(kind: str, fingerprint: str, *, tracking_uri: str = "") -> list[LineageNode]:
    """The runs that read an artefact, newest first: who used this table, who evaluated these
    weights."""
    from mlflow import MlflowClient

    client = MlflowClient(absolute_tracking_uri(tracking_uri))
    # A run with several inputs of one kind has them in one tag.
    runs = _search(client, f"tags.`{INPUT_TAG}{kind}` LIKE '%{fingerprint}%'")
    known: dict[str, LineageNode] = {}
    return [_node(client, run, known) for run in runs]


def _node(
    client: "MlflowClient", run: "MlflowEntity", known: dict[str, LineageNode]
) -> LineageNode:
    run_id = run.info.run_id
    if run_id in known:
        return known[run_id]
    tags = run.data.tags
    inputs = {
        name.removeprefix(INPUT_TAG): value.split(",")
        for name, value in sorted(tags.items())
        if name.startswith(INPUT_TAG)
    }
    outputs = {
        name.removeprefix(OUTPUT_TAG): value
        for name, value in sorted(tags.items())
        if name.startswith(OUTPUT_TAG) and not name.endswith(".uri")
    }
    node = LineageNode(
        run_id=run_id,
        stage=tags.get(STAGE_TAG, ""),
        status=run.info.status,
        inputs=inputs,
        outputs=outputs,
    )
    known[run_id] = node
    for kind, fingerprints in inputs.items():
        for fingerprint in fingerprints:
            makers = _search(client, f"tags.`{OUTPUT_TAG}{kind}` = '{fingerprint}'")
            if makers and makers[0].info.run_id != run_id:
                node.parents.append(_node(client, makers[0], known))
    return node


def _search(client: "MlflowClient", condition: str) -> "list[MlflowEntity]":
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"]))
