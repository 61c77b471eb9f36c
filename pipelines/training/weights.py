"""The weights that a pretraining leaves: at its end, or from its newest checkpoint before that."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from beit.objectives import Objective
from beit.weights import save_weights
from pipelines import storage
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError, parsing
from pipelines.training.checkpoint import load_newest
from pipelines.training.objective import build_objective
from pipelines.training.run_dir import RunDir

VOCABULARY = "lm_head.weight"


def save_encoder(
    config: PretrainConfig,
    objective: Objective,
    weights: Mapping[str, Tensor],
    directory: str,
    *,
    fingerprints: Mapping[str, Any],
    steps: int,
) -> None:
    """The encoder after `steps` steps as later stages load it, into a local directory."""
    save_weights(
        objective.export(weights),
        directory,
        extra={
            "pixel_mean": list(config.data.mean),
            "pixel_std": list(config.data.std),
            "fingerprints": dict(fingerprints),
            "steps": steps,
        },
    )


def is_unfinished(uri: str) -> bool:
    """Whether a run directory is there without its weights."""
    run = RunDir(uri)
    return storage.exists(run.at("run.json")) and not storage.exists(
        storage.join(run.weights, "config.json")
    )


def save_newest(uri: str, directory: str) -> int:
    """The encoder of an unfinished run's newest whole checkpoint, into a local directory.

    Returns its steps.

    Raises:
        InputError: there is no checkpoint, or none of a pretraining.
    """
    reasons: list[str] = []
    found = load_newest(RunDir(uri).checkpoints, rejected=lambda _, why: reasons.append(why))
    if found is None:
        why = f" ({reasons[0]})" if reasons else ""
        raise InputError(f"run = {uri}: the run has no whole checkpoint yet{why}; let it go on")
    with parsing(RunDir(uri).checkpoints, "only checkpoints of a pretraining are evaluated"):
        config = TypeAdapter(PretrainConfig).validate_python(found.state["config"])
    head = found.weights.get(VOCABULARY)
    objective = build_objective(config, None if head is None else len(head))
    save_encoder(
        config,
        objective,
        found.weights,
        directory,
        fingerprints=found.state["fingerprints"],
        steps=found.step,
    )
    return found.step
