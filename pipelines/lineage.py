"""`lineage`: what an artefact was made from, back to the images, and what was made from it.

Artefacts are known by fingerprints, not by places: a table that was moved is the same table.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.config.lineage import LineageConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tables.weights_store import weights_fingerprint
from pipelines.tracking import store
from pipelines.tracking.datasets import MAX_DIGEST_LENGTH
from pipelines.tracking.lineage import LineageNode, makers_of, node_of, users_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class LineageResult:
    """The answer."""

    lines: tuple[str, ...]
    """A tree before and one after, for people."""
    gaps: tuple[str, ...]
    """What no run of the store made."""

    def summary(self) -> str:
        """The trees."""
        return "\n".join(self.lines)


def run(config: LineageConfig) -> LineageResult:
    """Walks both ways.

    Raises:
        InputError: there is no such run, model or artefact, or the store does not know it.
        StageFailed: something in the chain was made by no run of the store; names it.
    """
    tracking_uri = store.absolute_tracking_uri(config.tracking.uri)
    store.quiet_mlflow()
    path = store.database_path(tracking_uri)
    if tracking_uri.startswith(store.SQLITE) and not path.exists():  # which connecting would make
        raise InputError(
            f"tracking.uri: no run is recorded at {str(path)!r}; name the store of your runs "
            "(--tracking.uri sqlite:///file.db; the default is mlflow.db of this directory)"
        )
    client = store.connect(tracking_uri)
    start = _run_of(client, config.artefact)
    root = node_of(client, client.get_run(start), {})
    lines = ["made from", *_before(root, "", set()), "", "used by", *_after(client, root)]
    gaps = tuple(
        f"{kind} {fingerprint}, read by {node.name} ({node.run_id[:8]})"
        for node in root.walk()
        for kind, fingerprint in node.gaps
    )
    result = LineageResult(lines=tuple(lines), gaps=gaps)
    if gaps:
        print(result.summary())
        raise StageFailed(
            f"no run of this store made {'; '.join(gaps)}: record it there (`beit sync`), or look "
            "in the store that it was made with (--tracking.uri)"
        )
    return result


def _run_of(client: "MlflowClient", artefact: str) -> str:
    """The run that made it. Raises InputError."""
    from mlflow.exceptions import MlflowException

    try:
        if artefact.startswith("models:/"):
            return _run_of_model(client, artefact.removeprefix("models:/"))
        if re.fullmatch(r"(runs:/)?[0-9a-f]{32}", artefact):
            return str(client.get_run(artefact.removeprefix("runs:/")).info.run_id)
    except MlflowException as error:
        raise InputError(f"artefact = {artefact!r}: {error}; list them with `beit ui`") from error
    kind, fingerprint = identity_of(storage.absolute(artefact))
    if kind == "run":
        return _run_of(client, fingerprint)
    makers = makers_of(client, kind, fingerprint) or users_of(client, kind, fingerprint)
    if not makers:
        raise InputError(
            f"artefact = {artefact!r}: no run of this store made or read the {kind} {fingerprint}; "
            "name the store that did (--tracking.uri)"
        )
    return str(makers[0].info.run_id)


def _run_of_model(client: "MlflowClient", name: str) -> str:
    registered, slash, version = name.rpartition("/")
    if not slash:
        return str(client.get_logged_model(name).source_run_id)
    if version.isdigit():
        return str(client.get_model_version(registered, version).run_id)
    return str(client.get_model_version_by_alias(registered, version).run_id)


def identity_of(uri: str) -> tuple[str, str]:
    """Kind and fingerprint of what a directory holds; of a run directory its MLflow run.

    Raises:
        InputError: it holds nothing that has a fingerprint.
    """
    if storage.exists(storage.join(uri, "run.json")):
        run_id = storage.read_json(storage.join(uri, "run.json"))["mlflow_run_id"]
        if not run_id:
            raise InputError(f"artefact = {uri!r}: this run was not recorded; `beit sync {uri}`")
        return "run", run_id
    if storage.exists(storage.join(uri, "weights.safetensors")):
        return "weights", weights_fingerprint(uri)
    try:
        manifest = storage.read_json(storage.join(uri, "manifest.json"))
    except FileNotFoundError as error:
        raise InputError(
            f"artefact = {uri!r}: no run, model, weights, tokenizer or table is there"
        ) from error
    return str(manifest["kind"]), str(manifest["fingerprint"])


def _before(node: LineageNode, indent: str, seen: set[str]) -> list[str]:
    known = " (see above)" if node.run_id in seen else ""
    lines = [f"{indent}{_label(node)}{known}"]
    if known:
        return lines
    seen.add(node.run_id)
    lines += [f"{indent}  {text}" for text in _artefacts(node)]
    for kind, fingerprint in node.gaps:
        lines.append(f"{indent}  ? {kind} {fingerprint[:SHOWN_DIGITS]}: made by no run known here")
    for parent in node.parents:
        lines += _before(parent, indent + "    ", seen)
    return lines


def _after(client: "MlflowClient", root: LineageNode) -> list[str]:
    lines, queue, seen = [], [(root, "")], {root.run_id}
    while queue:
        node, indent = queue.pop(0)
        for kind, fingerprint in node.outputs.items():
            for user in users_of(client, kind, fingerprint):
                if user.info.run_id not in seen:
                    seen.add(user.info.run_id)
                    child = node_of(client, user, {})
                    lines.append(f"{indent}{_label(child)}, from its {kind}")
                    lines += [f"{indent}  {text}" for text in _artefacts(child)]
                    queue.append((child, indent + "    "))
    return lines or ["nothing"]


def _label(node: LineageNode) -> str:
    return f"{node.name or node.stage} ({node.stage}, {node.status}, run {node.run_id[:8]})"


def _artefacts(node: LineageNode) -> list[str]:
    """What a run read and made, with sizes where they are known."""
    read = [
        f"reads {kind} {print_[:SHOWN_DIGITS]}{_rows(node, print_)}"
        for kind, prints in node.inputs.items()
        for print_ in prints
    ]
    made = [
        f"makes {kind} {print_[:SHOWN_DIGITS]} at {node.uris.get(kind, '?')}"
        for kind, print_ in node.outputs.items()
    ]
    return read + made


def _rows(node: LineageNode, fingerprint: str) -> str:
    rows = node.rows.get(fingerprint[:MAX_DIGEST_LENGTH])
    return f", {rows:,} rows" if rows else ""
