"""What stages read and make, as MLflow's data sets."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

INPUT_TAG, OUTPUT_TAG, STAGE_TAG = "beit.input.", "beit.output.", "beit.stage"
TOKENIZER_TAG = "beit.tokenizer"
"""Fingerprint of the tokenizer that a run's tokens, weights or figures come from, however far."""
COLUMNS = {
    "image_table": {
        "key": "string", "image": "binary", "height": "integer", "width": "integer",
        "label": "integer", "digest": "binary",
    },
    "token_table": {"key": "string", "token_ids": "binary"},
    "view_table": {"key": "string", "digest": "binary", "slot_0": "binary"},
}  # fmt: skip
"""What the tables hold, by kind."""
MAX_DIGEST_LENGTH = 36
CONTEXT_TAG = "mlflow.data.context"
"""What a table is for, as MLflow keeps it."""


class Table(Protocol):
    """What is said of a table."""

    uri: str

    @property
    def fingerprint(self) -> str:
        """What it holds."""

    @property
    def num_rows(self) -> int:
        """How many of them."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An artefact that a stage reads or writes."""

    name: str
    """Its kind: image_table, token_table, view_table, tokenizer or weights."""
    uri: str
    digest: str
    """Its fingerprint."""
    context: str = ""
    """What it is used for: training, evaluation, ..."""
    rows: int = 0
    """Of a table; 0 where nobody has counted."""

    @classmethod
    def of_table(cls, name: str, table: Table, context: str = "") -> "Dataset":
        """A table of a kind."""
        return cls(
            name=name, uri=table.uri, digest=table.fingerprint, context=context, rows=table.num_rows
        )


# Names of places in a chain, which say nothing: there, the directory above is named.
GENERIC = ("images", "tokens", "views", "tokenizer", "run", "weights", "evaluation")


def short_name(uri: str) -> str:
    """What people call an artefact: the last part of its URI that is a name of its own."""
    parts = [part for part in uri.partition("?")[0].split("/") if part]
    own = [part for part in parts if part not in GENERIC]
    return (own or parts or [""])[-1]


def dataset_inputs(inputs: Sequence[Mapping[str, Any]]) -> "list[DatasetInput]":
    """MLflow's form of the tables among `inputs`, which are records of `Dataset`."""
    return [_dataset_input(one) for one in inputs if one["name"] in COLUMNS]


def dataset_name(one: Mapping[str, Any]) -> str:
    """What MLflow calls it."""
    return f"{short_name(one['uri'])} ({one['name'].replace('_', ' ')})"


def dataset_label(entity: Any) -> str:
    """An entity of MLflow in words: name, rows, fingerprint."""
    rows = json.loads(entity.profile)["num_rows"] if entity.profile else 0
    size = f", {rows:,} rows" if rows else ""
    return f"{entity.name}{size}, fingerprint {entity.digest}"


def dataset_digest(one: Mapping[str, Any]) -> str:
    """Its fingerprint, as long as MLflow takes it."""
    return str(one["digest"][:MAX_DIGEST_LENGTH])


def _dataset_input(one: Mapping[str, Any]) -> "DatasetInput":
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    with warnings.catch_warnings():
        # MLflow warns that a local path could be read by each of two equal readers.
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(one["uri"])
    columns = [
        {"name": name, "type": kind, "required": name != "label"}
        for name, kind in COLUMNS[one["name"]].items()
    ]
    entity = Entity(
        name=dataset_name(one),
        digest=dataset_digest(one),
        source_type=source._get_source_type(),
        source=source.to_json(),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": one["rows"]}) if one["rows"] else None,
    )
    tags = [InputTag(CONTEXT_TAG, one["context"])] if one["context"] else []
    return DatasetInput(entity, tags)
