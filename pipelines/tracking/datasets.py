"""What stages read and make, as MLflow's data sets."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

TABLES = ("image_table", "token_table")
MAX_DIGEST_LENGTH = 36


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
    rows: int = 0
    """Of a table; 0 where nobody has counted."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Of a table: name -> type."""


def short_name(uri: str) -> str:
    """What people call an artefact: the last part of its URI."""
    return uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def dataset_inputs(inputs: Sequence[Mapping[str, Any]]) -> "list[DatasetInput]":
    """MLflow's form of the tables among `inputs`, which are records of `Dataset`."""
    return [_dataset_input(one) for one in inputs if one["name"] in TABLES]


def _dataset_input(one: Mapping[str, Any]) -> "DatasetInput":
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    with warnings.catch_warnings():
        # MLflow warns that a local path could be read by each of two equal readers.
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(one["uri"])
    columns = [
        {"name": name, "type": kind, "required": True} for name, kind in one["columns"].items()
    ]
    entity = Entity(
        name=f"{short_name(one['uri'])} ({one['name'].replace('_', ' ')})",
        digest=one["digest"][:MAX_DIGEST_LENGTH],
        source_type=source._get_source_type(),
        source=source.to_json(),
        schema=json.dumps({"mlflow_colspec": columns}) if columns else None,
        profile=json.dumps({"num_rows": one["rows"]}) if one["rows"] else None,
    )
    tags = [InputTag("mlflow.data.context", one["context"])] if one["context"] else []
    return DatasetInput(entity, tags)
