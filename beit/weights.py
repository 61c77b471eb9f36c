"""Weights of a trained network as a folder: `weights.safetensors` and `config.json`.

Tensors carry the names of the official code, for pretraining or for fine-tuning; the configuration
rebuilds the network, and says how its input pixels were normalised. Reading executes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file

from beit.classifier import BeitClassifier
from beit.git_lfs import check_fetched
from beit.mim import BeitMIM
from beit.tensor_files import read_tensors

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
#: What `config.json` calls the two networks that have such a folder.
FORMATS: Mapping[str, type[BeitMIM] | type[BeitClassifier]] = {
    "beit-mim": BeitMIM,
    "beit-classifier": BeitClassifier,
}


def save_weights(
    model: BeitMIM | BeitClassifier,
    directory: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` into `directory` (made if absent), float32 on disk as in memory.

    `extra` is anything JSON that a later user needs and weights cannot tell: by convention
    `pixel_mean` and `pixel_std` (per channel, of pixels in [0, 1]), fingerprints, and of a
    classifier `class_names`.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    kind = next(name for name, network in FORMATS.items() if isinstance(model, network))
    config = {"format": kind, "version": 1, "model": model.config(), "extra": dict(extra or {})}
    config["seal"] = _seal(config, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_weights_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a weights folder: keys `model` and `extra`; ValueError if it is none."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not a weights folder")
    check_fetched(path)
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not is_ours(config) or "model" not in config:
        expected = " or ".join(map(repr, FORMATS))
        raise ValueError(f"{path}: format is not {expected}; expected what save_weights writes")
    if config.get("version") != 1:
        raise ValueError(f"{path}: version {config.get('version')!r} is unknown, expected 1")
    return config


def is_ours(config: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the contents of a `config.json` are those of a weights folder."""
    return isinstance(config, dict) and config.get("format") in FORMATS


def load_weights(directory: str | Path) -> BeitMIM | BeitClassifier:
    """The network of a weights folder, on the CPU, in training mode.

    ValueError names what is missing, does not fit, or was changed after it was written.
    """
    config = read_weights_config(directory)
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the folder has a configuration but no weights")
    network = FORMATS[config["format"]]
    try:
        with torch.device("meta"):
            expected = network(**config["model"]).state_dict()
    except Exception as error:  # any value may stand where a size is wanted
        raise ValueError(
            f"{path.with_name(CONFIG_FILE)} does not describe a network: {error!r}"
        ) from error
    state = read_tensors(path)
    check_state(state, expected, source=str(path))
    # Earlier releases wrote no seals.
    if "seal" in config and config.pop("seal") != _seal(config, path):
        raise ValueError(
            f"{path} or {CONFIG_FILE} beside it was changed after it was written (whoever changed "
            f"{CONFIG_FILE} on purpose removes its field seal)"
        )
    model = network(**config["model"])
    model.load_state_dict(state, strict=True)
    return model


def _seal(config: Mapping[str, Any], weights: Path) -> str:
    """Hash of a configuration and of the file of weights beside it."""
    with weights.open("rb") as file:
        hashed = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    hashed.update(json.dumps(config, sort_keys=True).encode())
    return hashed.hexdigest()


def check_state(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    source: str,
    spelling: Callable[[str], str] = str,
) -> None:
    """ValueError naming every missing, unknown or misshapen tensor of `state`.

    `spelling` turns our name of a tensor into the one that the reader of the message knows.
    """
    missing = sorted({spelling(name) for name in expected.keys() - state.keys()})
    unknown = sorted({spelling(name) for name in state.keys() - expected.keys()})
    misshapen = [
        f"{spelling(name)} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    problems = [
        f"{label}: {', '.join(names)}"
        for label, names in (("missing", missing), ("unknown", unknown), ("shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit the network; " + "; ".join(problems))
