"""Vision models of `transformers` as teachers, from a folder with safetensors.

Which of a family's states are its features is stated here, family by family; a family that is not
named is refused, because the wrong state trains as smoothly as the right one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.teachers import Teacher
from pipelines.errors import InputError
from pipelines.teachers.folders import (
    INSTALL,
    folder_fingerprint,
    identity,
    normalisation_of,
    patches_a_side,
)

PROJECTED = "patch states after the last norm and the projection"
NORMED = "patch states after the last norm"
FAMILIES: Mapping[str, tuple[str, str]] = {
    "clip": ("CLIPVisionModelWithProjection", PROJECTED),
    "clip_vision_model": ("CLIPVisionModelWithProjection", PROJECTED),
    "dinov2": ("Dinov2Model", NORMED),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", NORMED),
    "vit": ("ViTModel", NORMED),
}
"""model_type to class and feature: CLIP's is BEiT v2's own target, ViT's is that of DINO."""
ANY_SIZE = ("dinov2", "dinov2_with_registers")
"""Families that resize their positions themselves: they take the size of the tokenizer's grid."""


def transformers_teacher(
    folder: Path, config: Mapping[str, Any], uri: str, *, layer: int | None, side: int, device: str
) -> Teacher:
    """The teacher in a folder as `save_pretrained` writes it; `side` patches a side are wanted.

    Raises:
        InputError: transformers is not installed, a family that is not known here, weights that do
            not fill the network, or no such layer.
    """
    family = str(config["model_type"])
    if family not in FAMILIES:
        raise InputError(
            f"teacher = {uri}: model_type {family!r} is no teacher that is known here; "
            f"take one of {', '.join(FAMILIES)}, or a run of your own"
        )
    class_name, feature = FAMILIES[family]
    model = _load(class_name, folder, uri).to(device)
    vision = getattr(model.config, "vision_config", model.config)
    size = side * vision.patch_size if family in ANY_SIZE else vision.image_size
    grid = patches_a_side(size, vision.patch_size, uri)
    if layer is not None and layer > vision.num_hidden_layers:
        raise InputError(
            f"teacher = {uri}: layer {layer} is none of its layers 1 to "
            f"{vision.num_hidden_layers}; leave it out for the {feature}"
        )
    prefix = 1 + int(getattr(vision, "num_register_tokens", 0))
    said = feature if layer is None else f"patch states after layer {layer}"
    mean, std = normalisation_of(folder, uri)
    weights = folder_fingerprint(folder)
    projected = layer is None and feature == PROJECTED
    return Teacher(
        network=_network(model, layer, prefix, projected=projected),
        image_size=size,
        grid_size=(grid, grid),
        dim=vision.projection_dim if projected else vision.hidden_size,
        mean=mean,
        std=std,
        name=f"{family} {uri}, {said}",
        weights=weights,
        fingerprint=identity(weights, said, size, mean=mean, std=std),
    )


def _load(class_name: str, folder: Path, uri: str) -> Any:
    try:
        import transformers

        kind = getattr(transformers, class_name)  # imported only now, with torchvision
    except (ImportError, RuntimeError, AttributeError) as error:  # the last of an old release
        raise InputError(
            f"teacher = {uri}: a model of transformers, which cannot be imported ({error}); "
            f"{INSTALL}"
        ) from error
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"teacher = {uri}: transformers cannot read it: {error}") from error
    # What is missing would be drawn at random, with a warning at most. Poolers are not looked at.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(f"teacher = {uri}: the weights lack {', '.join(missing[:5])}")
    return model.eval().requires_grad_(requires_grad=False)


def _network(
    model: Any, layer: int | None, prefix: int, *, projected: bool
) -> Callable[[Tensor], Tensor]:
    """Normalised pixels to patch states; `prefix` tokens stand before the patches."""

    @torch.no_grad()
    def states(pixels: Tensor) -> Tensor:
        out = model(pixel_values=pixels, output_hidden_states=layer is not None)
        state: Tensor = out.last_hidden_state if layer is None else out.hidden_states[layer]
        patches = state[:, prefix:]
        if projected:
            patches = model.visual_projection(model.vision_model.post_layernorm(patches))
        return patches

    return states
