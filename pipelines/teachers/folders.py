"""What teachers of other libraries share: their files, identity, normalisation and grid."""

import json
from pathlib import Path
from typing import Any

from beit.teachers import Normalisation
from pipelines import storage
from pipelines.errors import InputError

INSTALL = (
    "install the extra beit-ray[teachers], with a torchvision for this build of torch "
    "(docs/tokenizer.md has the command)"
)
"""What to do where a library of teachers cannot be imported."""


def read_config(folder: Path, uri: str) -> dict[str, Any]:
    """config.json of a folder. Raises InputError for one that cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"teacher = {uri}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"teacher = {uri}: config.json is no object")
    return config


def folder_fingerprint(folder: Path) -> str:
    """Identity of a folder's configuration and weights, by names and contents."""
    files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    return storage.fingerprint(
        {file.name: storage.digest(file.read_bytes()) for file in sorted(files)}
    )


def identity(weights: str, feature: str, image_size: int, **beside: Normalisation) -> str:
    """Fingerprint of a teacher: what it has learnt, what is taken of it, at which size.

    `beside` is what it computes by that stands in no file of `folder_fingerprint`.
    """
    return storage.fingerprint(
        {"weights": weights, "feature": feature, "image_size": image_size, **beside}
    )


def normalisation_of(folder: Path, uri: str) -> tuple[Normalisation, Normalisation]:
    """Mean and deviation of preprocessor_config.json; InputError without them, never a guess."""
    path = folder / "preprocessor_config.json"
    try:
        values = json.loads(path.read_text())
        return triple(values["image_mean"]), triple(values["image_std"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"teacher = {uri}: {path.name} with image_mean and image_std is needed ({error!r}): "
            "copy it from where the weights are from"
        ) from error


def triple(values: Any) -> Normalisation:
    """Three numbers, one a channel. Raises ValueError for anything else."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def patches_a_side(image_size: Any, patch_size: Any, uri: str) -> int:
    """Rows (= columns) of the grid. Raises InputError for images that are not square."""
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        raise InputError(
            f"teacher = {uri}: image_size {image_size} and patch_size {patch_size}: only square "
            "ones are taken"
        )
    return image_size // patch_size
