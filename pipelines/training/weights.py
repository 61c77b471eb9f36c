"""The weights that a pretraining leaves: at its end, or from its newest checkpoint before that."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter
from torch import Tensor

from beit.mae import MaeNetwork
from beit.mim import BeitV2MIM
from beit.objectives import Objective
from beit.weights import save_weights
from pipelines import storage
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError, parsing
from pipelines.training.checkpoint import Checkpoint, DamagedCheckpointError, load, load_newest
from pipelines.training.objective import build_objective
from pipelines.training.run_dir import RunDir

VOCABULARY = "lm_head.weight"
KINDS: Mapping[str, type[BeitV2MIM | MaeNetwork]] = {"beitv2": BeitV2MIM, "mae": MaeNetwork}


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
    config, objective = _trained(uri, found)
    save_encoder(
        config,
        objective,
        found.weights,
        directory,
        fingerprints=found.state["fingerprints"],
        steps=found.step,
    )
    return found.step


def whole_network(
    uri: str, kind: type[BeitV2MIM | MaeNetwork], *, steps: int
) -> BeitV2MIM | MaeNetwork | None:
    """The network of a finished run with what only pretraining needs, as it was after `steps`.

    None where `uri` is no run that trained a network of this kind.

    Raises:
        InputError: the checkpoint that has it is gone or damaged.
    """
    run = RunDir(uri)
    file = run.at("config.yaml")
    if not storage.exists(file):
        return None
    with parsing(file, "it is not what the run wrote"):
        objective = yaml.safe_load(storage.read_bytes(file)).get("objective", {}).get("kind")
    if KINDS.get(objective) is not kind:
        return None
    try:
        found = load(run.checkpoints, steps)
    except DamagedCheckpointError as error:
        raise InputError(
            f"run = {uri}: what {objective} trains beside the encoder is in the checkpoint after "
            f"{steps} steps only, and that is gone or damaged ({error}); give --encoder_only true "
            "for the encoder alone"
        ) from error
    network = _trained(uri, found)[1].network
    assert isinstance(network, kind)
    network.load_state_dict(found.weights)
    return network


def _trained(uri: str, found: Checkpoint) -> tuple[PretrainConfig, Objective]:
    """Configuration and objective of a checkpoint, with fresh weights."""
    with parsing(RunDir(uri).checkpoints, "only checkpoints of a pretraining have an encoder"):
        config = TypeAdapter(PretrainConfig).validate_python(found.state["config"])
    head = found.weights.get(VOCABULARY)
    return config, build_objective(config, None if head is None else len(head))
