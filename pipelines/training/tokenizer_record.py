"""What the output of `train-tokenizer` says of the run that fills it; is this that run?"""

from typing import Any

from pipelines import storage
from pipelines.errors import InputError

STAGE = "train-tokenizer"
RECORD = "training.json"


def open_output(output: str, source: dict[str, Any]) -> dict[str, Any]:
    """The record of an interrupted run that this one continues, or of a new one.

    Raises:
        InputError: the output was begun with other options, or is of another stage.
    """
    try:
        record: dict[str, Any] = storage.read_json(storage.join(output, RECORD))
    except (FileNotFoundError, NotADirectoryError):
        record = {"source": source, "mlflow_run_id": ""}
        storage.write_json(storage.join(output, RECORD), record)
        return record
    require_same(record["source"], source, output)
    return record


def require_same(old: dict[str, Any], new: dict[str, Any], output: str) -> None:
    """Raises InputError naming every option that differs between two runs into one output."""
    if old.get("stage") != STAGE:
        raise InputError(
            f"output = {output}: holds a tokenizer made by {old.get('stage')!r}; give another one"
        )
    before = {"image_table": old["image_table"], **old["options"]}
    after = {"image_table": new["image_table"], **new["options"]}
    changed = [
        f"{name} is {after.get(name)!r}, was {before.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise InputError(
            f"output = {output}: begun with other settings ({'; '.join(changed)}); "
            "restore them, or give another output"
        )
