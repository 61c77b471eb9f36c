"""OpenAI's discrete VAE (DALL-E, arXiv 2102.12092), whose codes are BEiT's visual tokens.

Layer layout, parameter names and initialisation follow openai/DALL-E at commit 5be4b23
(`dall_e/encoder.py`, `decoder.py`, `utils.py`), so that its state dict loads strictly. Different:
the code; the residual sum is one fused `add` (the gain 1/64 is a power of two, hence exact);
precision is a stated mode of the module and not a consequence of the device.
"""

import math
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.discrete_vae import DiscreteVae

NUM_GROUPS = 4
STRIDE = 8


class Conv(nn.Module):
    """Stride-1 convolution with "same" padding and OpenAI's parameter names `w` and `b`."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        weight = torch.empty(out_dim, in_dim, kernel_size, kernel_size)
        self.w = nn.Parameter(weight.normal_(std=1 / math.sqrt(in_dim * kernel_size**2)))
        self.b = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.kernel_size - 1) // 2)


class ResidualBlock(nn.Module):
    """x -> id(x) + gain * [ReLU, conv] x 4, with a quarter of the width inside."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_sizes: tuple[int, ...], post_gain: float
    ) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = Conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        widths = [in_dim, *[out_dim // 4] * 3, out_dim]
        self.res_path = nn.Sequential(
            OrderedDict(
                (f"conv_{i}", Conv(widths[i - 1], widths[i], kernel_size))
                for i, kernel_size in enumerate(kernel_sizes, start=1)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.res_path:
            y = conv(F.relu(y))
        return torch.add(self.id_path(x), y, alpha=self.post_gain)


def _group(
    in_dim: int,
    out_dim: int,
    num_blocks: int,
    kernel_sizes: tuple[int, ...],
    post_gain: float,
    resample: tuple[str, nn.Module] | None,
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(num_blocks):
        layers[f"block_{i + 1}"] = ResidualBlock(
            in_dim if i == 0 else out_dim, out_dim, kernel_sizes, post_gain
        )
    if resample is not None:
        layers[resample[0]] = resample[1]
    return nn.Sequential(layers)


class _OwnPrecision(Conv):
    """A convolution that autocast does not reach: in bfloat16 4.5 % of DALL-E's tokens change, and
    8.5 % of the largest logits tie."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.w.dtype))


class _Output(nn.Module):
    """ReLU and the final 1x1 convolution, always in the convolution's own precision."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = _OwnPrecision(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.relu(x))
        return out


def _check_dims(**dims: int) -> None:
    for name, value in dims.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if dims["hidden_dim"] % 4:
        raise ValueError(f"hidden_dim {dims['hidden_dim']} must be a multiple of 4")


class DalleEncoder(nn.Module):
    """images (B,3,H,W) in [0.1, 0.9] -> logits (B, vocab_size, H/8, W/8), float32.

    The published network is the default: 53,786,240 parameters, 52.1 GFLOP at 112 x 112.
    """

    def __init__(
        self, hidden_dim: int = 256, blocks_per_group: int = 2, vocab_size: int = 8192
    ) -> None:
        super().__init__()
        _check_dims(hidden_dim=hidden_dim, blocks_per_group=blocks_per_group, vocab_size=vocab_size)
        gain = 1 / (NUM_GROUPS * blocks_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(3, hidden_dim, 7))
        for group in range(NUM_GROUPS):
            layers[f"group_{group + 1}"] = _group(
                hidden_dim * 2 ** max(0, group - 1),
                hidden_dim * 2**group,
                blocks_per_group,
                (3, 3, 3, 1),
                gain,
                ("pool", nn.MaxPool2d(2)) if group < NUM_GROUPS - 1 else None,
            )
        layers["output"] = _Output(hidden_dim * 8, vocab_size)
        self.blocks = nn.Sequential(layers)

    def half_trunk(self) -> None:
        """float16 in all but the output convolution: what OpenAI's code computes on CUDA."""
        for name, layer in self.blocks.named_children():
            if name != "output":
                layer.to(torch.float16)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for other than float32 (B,3,H,W) with H, W multiples of 8."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise ValueError(
                f"images of dtype {images.dtype} and shape {tuple(images.shape)}: "
                "float32 (B,3,H,W) expected"
            )
        if images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"image size {tuple(images.shape[2:])} is not a multiple of {STRIDE}")
        trunk_dtype = next(self.blocks.parameters()).dtype
        logits: Tensor = self.blocks(images.to(trunk_dtype))
        return logits.float()


class DalleDecoder(nn.Module):
    """z (B, vocab_size, h, w), one-hot or soft -> (B, 6, 8h, 8w): mu and ln b of logit-Laplace.

    The published network is the default: 43,829,766 parameters.
    """

    def __init__(
        self,
        hidden_dim: int = 256,
        init_dim: int = 128,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
    ) -> None:
        super().__init__()
        _check_dims(
            hidden_dim=hidden_dim,
            init_dim=init_dim,
            blocks_per_group=blocks_per_group,
            vocab_size=vocab_size,
        )
        self.vocab_size = vocab_size
        gain = 1 / (NUM_GROUPS * blocks_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            input=_OwnPrecision(vocab_size, init_dim, 1)
        )
        in_dim = init_dim
        for group in range(NUM_GROUPS):
            out_dim = hidden_dim * 2 ** (NUM_GROUPS - 1 - group)
            layers[f"group_{group + 1}"] = _group(
                in_dim,
                out_dim,
                blocks_per_group,
                (1, 3, 3, 3),
                gain,
                ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
                if group < NUM_GROUPS - 1
                else None,
            )
            in_dim = out_dim
        layers["output"] = _Output(hidden_dim, 6)
        self.blocks = nn.Sequential(layers)

    def forward(self, z: Tensor) -> Tensor:
        """Raises ValueError for other than (B, vocab_size, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.vocab_size:
            raise ValueError(f"z of shape {tuple(z.shape)}: (B,{self.vocab_size},h,w) expected")
        out: Tensor = self.blocks(z)
        return out


class DalleTokenizer(DiscreteVae):
    """The DALL-E encoder, and its decoder where one is at hand, as an image tokenizer."""

    architecture: ClassVar[str] = "dalle"

    def __init__(
        self,
        *,
        image_size: int = 112,
        hidden_dim: int = 256,
        init_dim: int = 128,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
        has_decoder: bool = True,
    ) -> None:
        decoder = (
            DalleDecoder(hidden_dim, init_dim, blocks_per_group, vocab_size)
            if has_decoder
            else None
        )
        super().__init__(
            DalleEncoder(hidden_dim, blocks_per_group, vocab_size),
            decoder,
            image_size=image_size,
            stride=STRIDE,
            vocab_size=vocab_size,
        )
        self.hidden_dim = hidden_dim
        self.init_dim = init_dim
        self.blocks_per_group = blocks_per_group

    def model_config(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "hidden_dim": self.hidden_dim,
            "init_dim": self.init_dim,
            "blocks_per_group": self.blocks_per_group,
            "vocab_size": self.vocab_size,
            "has_decoder": self.decoder is not None,
        }
