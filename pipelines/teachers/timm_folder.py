"""Vision transformers of `timm` as teachers, from a folder with safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from beit.teachers import Teacher
from pipelines.errors import InputError
from pipelines.teachers.folders import (
    INSTALL,
    folder_fingerprint,
    identity,
    patches_a_side,
    triple,
)

WEIGHTS = "model.safetensors"
FEATURE = "patch states after the last norm"


def timm_teacher(
    folder: Path, config: Mapping[str, Any], uri: str, *, layer: int | None, device: str
) -> Teacher:
    """The teacher in a folder as the hub has timm's: config.json and model.safetensors.

    Raises:
        InputError: timm is not installed or does not know the network, weights that do not fill
            it, a network that is no vision transformer, or no such layer.
    """
    architecture = str(config["architecture"])
    model = _load(architecture, folder, uri).to(device)
    if not hasattr(model, "blocks") or not hasattr(model, "num_prefix_tokens"):
        raise InputError(f"teacher = {uri}: {architecture} is no vision transformer; take one")
    depth = len(model.blocks)
    if layer is not None and layer > depth:
        raise InputError(
            f"teacher = {uri}: layer {layer} is none of its layers 1 to {depth}; leave it out for "
            f"the {FEATURE}"
        )
    size, patch_size = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    side = patches_a_side(size, patch_size, uri)
    said = FEATURE if layer is None else f"patch states after layer {layer}"
    known = config.get("pretrained_cfg", {})
    try:
        mean, std = triple(known["mean"]), triple(known["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"teacher = {uri}: config.json lacks pretrained_cfg.mean or .std ({error!r}): copy it "
            "from where the weights are from"
        ) from error

    @torch.no_grad()
    def states(pixels: Tensor) -> Tensor:
        if layer is None:
            tokens: Tensor = model.forward_features(pixels)
            return tokens[:, model.num_prefix_tokens :]
        (found,) = model.get_intermediate_layers(pixels, n=[layer - 1])
        patches: Tensor = found
        return patches

    weights = folder_fingerprint(folder)
    return Teacher(
        network=states,
        image_size=size,
        grid_size=(side, side),
        dim=model.num_features,
        mean=mean,
        std=std,
        name=f"{architecture} {uri}, {said}",
        weights=weights,
        fingerprint=identity(weights, said, size),
    )


def _load(architecture: str, folder: Path, uri: str) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision of another build
        raise InputError(
            f"teacher = {uri}: a model of timm, which cannot be imported ({error}); {INSTALL}"
        ) from error
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=0)
        report = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except Exception as error:
        raise InputError(f"teacher = {uri}: timm cannot read it: {error}") from error
    # The classifier is left out; anything else that is missing would be drawn at random.
    unknown = [name for name in report.unexpected_keys if not name.startswith(("head", "fc"))]
    if report.missing_keys or unknown:
        raise InputError(
            f"teacher = {uri}: the weights are not those of {architecture}: missing "
            f"{report.missing_keys[:5]}, unknown {unknown[:5]}"
        )
    return model.eval().requires_grad_(requires_grad=False)
