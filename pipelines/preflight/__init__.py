"""Before accelerators are asked for: can every node of the cluster do what a stage needs?

A small task on each node reads and writes where the stage will, and says what it is made of. What
does not fit is one sentence with its remedy.
"""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.errors import InputError, StageFailed
from pipelines.preflight import capacity
from pipelines.preflight.capacity import Bundle
from pipelines.preflight.node import (
    MARK,
    Place,
    Question,
    Report,
    Trouble,
    examine,
    existing_directory,
)
from pipelines.redaction import redacted_text
from pipelines.steps import say_step

__all__ = ["Bundle", "Needs", "Place", "findings", "require"]

# Of a node that has to start a process and import torch first.
ANSWER_SECONDS = 120.0
# Nodes that come without an autoscaler (an operator's, a queue's) may be on their way.
NODE_SECONDS, SAY_SECONDS = 120.0, 30.0
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a stage will ask of the nodes."""

    places: tuple[Place, ...] = ()
    bundles: tuple[tuple[Bundle, ...], ...] = ()
    """What must be there, or it never begins; that of one group at once."""
    gpu: bool | None = None
    """Whether it computes on GPUs; None: where the cluster has some."""
    tracking_uri: str = ""
    """MLflow server that nodes send figures to; "": none."""


@dataclass(frozen=True, eq=False)
class _Node:
    id: str
    name: str
    resources: Mapping[str, float]


def require(needs: Needs) -> None:
    """Refuses to begin what cannot end well; waits a while for nodes.

    Raises:
        InputError: something does not fit; a sentence for each, by name.
        StageFailed: nodes are missing, and no autoscaler is there to bring them.
    """
    _wait_for_nodes(needs.bundles)
    nodes = len(_nodes())
    if nodes > 1:
        say_step(f"preflight: asking {nodes} nodes whether they can do it")
    found = findings(dataclasses.replace(needs, bundles=()))
    if found:
        raise InputError("\n".join(found))
    if nodes > 1:
        say_step("preflight: all of them can")


def findings(needs: Needs) -> list[str]:
    """What does not fit, a sentence for each. Ray must be running."""
    nodes = _nodes()
    here = ray.get_runtime_context().get_node_id()
    nodes.sort(key=lambda node: node.id != here)
    marked = tuple(_with_mark(place) for place in needs.places)

    def question(node: _Node, places: tuple[Place, ...]) -> Question:
        gpus = 0.0 if needs.gpu is False else node.resources.get("GPU", 0.0)
        return Question(node=node.id[:8], places=places, gpus=gpus, tracking_uri=needs.tracking_uri)

    with _own_marks_removed(marked):
        own = examine(question(nodes[0], marked))
        # Where the driver has found nothing, other nodes have nothing to compare with.
        shared = tuple(
            dataclasses.replace(place, seen=own.seen[place.field])
            for place in marked
            if place.field in own.seen
        )
        answers = {nodes[0]: own}
        answers |= _ask({node: question(node, shared) for node in nodes[1:]})
    missing = _missing(needs.bundles, nodes)
    return [
        *([] if missing and capacity.autoscaled() else missing),
        *_sentences({node: report.troubles for node, report in answers.items()}),
        *_sentences({node: _differences(own, report) for node, report in answers.items()}),
    ]


def _nodes() -> list[_Node]:
    """Nodes that work, and the driver's own."""
    here = ray.get_runtime_context().get_node_id()
    return [
        _Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and (node["NodeID"] == here or {"CPU", "GPU"} & node["Resources"].keys())
    ]


def _with_mark(place: Place) -> Place:
    """With the file by which a node shows that it sees and may write the same place."""
    if not place.written:
        return place
    name = f"{MARK}{uuid.uuid4().hex[:12]}.tmp"  # nothing that a stage would take for its own
    uri = storage.absolute(place.uri)
    within = str(existing_directory(uri)) if storage.is_local(uri) else uri
    return dataclasses.replace(place, mark=storage.join(within, name))


@contextlib.contextmanager
def _own_marks_removed(places: Sequence[Place]) -> Iterator[None]:
    try:
        yield
    finally:
        for place in places:
            if place.mark:
                with contextlib.suppress(OSError, InputError):
                    storage.delete(place.mark)


def _ask(questions: Mapping[_Node, Question]) -> dict[_Node, Report]:
    """The answers of nodes, each from a process of its own there."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(examine)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(question): node
        for node, question in questions.items()
    }
    if not asked:
        return {}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    for reference in late:
        say_step(
            f"preflight: node {asked[reference].name} has not answered within "
            f"{ANSWER_SECONDS:.0f} s; left out"
        )
        ray.cancel(reference, force=True)
    return {asked[reference]: _answer(reference) for reference in ready}


def _answer(reference: Any) -> Report:
    try:
        report: Report = ray.get(reference)
    except ray.exceptions.NodeDiedError:
        return Report(versions={}, troubles=(), seen={})  # Ray gives its work to others
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        trouble = Trouble(
            subject="node", reason=f"a task does not start ({lines[-1].strip()[:300]})",
            remedy="give all nodes the same image or environment, with this package's dependencies",
        )  # fmt: skip
        return Report(versions={}, troubles=(trouble,), seen={})
    return report


def _differences(own: Report, other: Report) -> tuple[Trouble, ...]:
    return tuple(
        Trouble(
            subject="versions",
            reason=f"{name} {version}, the driver has {own.versions[name]}",
            remedy="use one image on all nodes",
        )
        for name, version in other.versions.items()
        if version != own.versions[name]
    )


def _sentences(troubles: Mapping[_Node, Sequence[Trouble]]) -> list[str]:
    """One for each trouble, with the nodes that have it."""
    nodes: dict[Trouble, list[str]] = {}
    for node, found in troubles.items():
        for trouble in found:
            nodes.setdefault(trouble, []).append(node.name)
    return [redacted_text(trouble.sentence(_named(names))) for trouble, names in nodes.items()]


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    listed = ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"node {listed}" if len(names) == 1 else f"nodes {listed}"


def _missing(groups: Sequence[Sequence[Bundle]], nodes: Sequence[_Node]) -> list[str]:
    there = [node.resources for node in nodes]
    return [sentence for group in groups for sentence in capacity.shortages(group, there)]


def _wait_for_nodes(groups: Sequence[Sequence[Bundle]]) -> None:
    give_up_at = time.monotonic() + NODE_SECONDS
    while missing := _missing(groups, _nodes()):
        if capacity.autoscaled():
            say_step(f"preflight: {'; '.join(missing)}; the autoscaler is asked")
            return
        if time.monotonic() > give_up_at:
            raise StageFailed("\n".join(missing))
        say_step(f"preflight: {'; '.join(missing)}; waiting for nodes")
        time.sleep(SAY_SECONDS)
