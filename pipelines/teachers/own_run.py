"""A run of `pretrain` as teacher: for those who have no network of anybody else."""

import torch
from torch import Tensor

from beit.classifier import BeitClassifier
from beit.teachers import Teacher
from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluation.features import open_weights


def run_teacher(uri: str, *, layer: int | None, device: str) -> Teacher:
    """Patch states of a run's encoder after block `layer` (from 1); None: after the final norm.

    A fine-tuned run norms no patches: there None is the last block.

    Raises:
        InputError: no weights there, or no such block.
    """
    weights = open_weights(uri, field="teacher")
    model = weights.model.to(device).requires_grad_(requires_grad=False)
    if layer is not None and not 1 <= layer <= model.depth:
        raise InputError(
            f"teacher = {uri}: layer {layer} is none of its blocks 1 to {model.depth}; choose one "
            "of them, or leave it out for the states after the final norm"
        )
    height, width = model.image_size
    if height != width:
        raise InputError(f"teacher = {uri}: its images are {height} x {width}, not square")

    def patch_states(pixels: Tensor) -> Tensor:
        states: Tensor = model.features(pixels, layer=layer)
        return states[:, 1:]

    labelled = isinstance(model, BeitClassifier)
    if layer is None and not labelled:
        feature = "final norm"
    else:
        feature = f"block {layer or model.depth} of {model.depth}"
    labels = " (labels trained it)" if labelled else ""
    return Teacher(
        network=torch.no_grad()(patch_states),
        image_size=height,
        grid_size=model.grid_size,
        dim=model.dim,
        mean=weights.mean,
        std=weights.std,
        name=f"run {weights.uri}, patches after {feature}{labels}",
        weights=weights.fingerprint,
        fingerprint=storage.fingerprint({"weights": weights.fingerprint, "feature": feature}),
    )
