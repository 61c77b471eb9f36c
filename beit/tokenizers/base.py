"""What every image tokenizer shares: pictures to tokens and back, identity, precision."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.views import Interpolation

Precision = Literal["float32", "float16"]
PIXEL_MARGIN = 0.1
"""Half of what DALL-E's `map_pixels` cuts off [0, 1]: logit-Laplace needs values inside (0, 1)."""


def map_pixels(images: Tensor, margin: float = PIXEL_MARGIN) -> Tensor:
    """uint8 (B,3,H,W) -> float32 in [margin, 1 - margin], as unilm: ToTensor, then map_pixels."""
    return (1 - 2 * margin) * (images.to(torch.float32) / 255) + margin


def unmap_pixels(values: Tensor, margin: float = PIXEL_MARGIN) -> Tensor:
    """The inverse of `map_pixels`: float (B,3,H,W) -> uint8, clamped and rounded."""
    unit = ((values.float() - margin) / (1 - 2 * margin)).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8)


def fingerprint_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """blake2b-128 over the canonical configuration and every tensor (name, dtype, shape, bytes)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ImageTokenizer(nn.Module, ABC):
    """Pictures to token ids and back; what the pipelines ask of a tokenizer. A discrete VAE.

    It looks at views of side `image_size` (112 for DALL-E's 14 x 14 tokens), made from the source
    pixels by the filter `interpolation`.

    `encoder(pixels in [0.1, 0.9]) -> logits (B,V,h,w)`; `decoder(z (B,V,h,w)) -> (B,6,H,W)`: three
    maps of mu and three of ln b. The decoder may be missing (labels need none); `decode` then
    raises ValueError. Weights are float32; `set_precision("float16")` converts the encoder's trunk
    for speed and leaves the output convolution, and the identity of the tokenizer, alone.
    """

    architecture: ClassVar[str]
    interpolation: Interpolation = "lanczos"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        *,
        image_size: int,
        stride: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        if image_size < stride or image_size % stride:
            raise ValueError(
                f"image_size {image_size} is not a multiple of the tokenizer's stride {stride}: "
                f"choose {max(1, round(image_size / stride)) * stride}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.image_size = image_size
        self.stride = stride
        self.vocab_size = vocab_size
        self.precision: Precision = "float32"
        self._fingerprint: str | None = None

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return (self.image_size // self.stride, self.image_size // self.stride)

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """The constructor's keyword arguments."""

    def config(self) -> dict[str, Any]:
        """What config.json holds: everything a reader needs to rebuild and feed the tokenizer."""
        return {
            "schema_version": 1,
            "architecture": self.architecture,
            "vocab_size": self.vocab_size,
            "image_size": self.image_size,
            "grid_size": list(self.grid_size),
            "stride": self.stride,
            "pixel_range": [PIXEL_MARGIN, 1 - PIXEL_MARGIN],
            "interpolation": self.interpolation,
            "has_decoder": self.decoder is not None,
            "model": self.model_config(),
        }

    def fingerprint(self) -> str:
        """Identity of configuration and float32 weights; the same on every device and precision.

        Computed once and kept: call it after training, not during.
        """
        if self._fingerprint is None:
            if self.precision != "float32":
                raise ValueError("fingerprint() must be taken before the weights are rounded")
            self._fingerprint = fingerprint_of(self.config(), self.state_dict())
        return self._fingerprint

    def set_precision(self, precision: Precision) -> None:
        """float16 rounds the encoder's trunk, as OpenAI's code does on CUDA. Not reversible."""
        if precision not in ("float32", "float16"):
            raise ValueError(f"precision {precision!r}: choose float32 or float16")
        if precision == self.precision:
            return
        if precision == "float32":
            raise ValueError("a float16 tokenizer has lost its float32 weights: load it again")
        self.fingerprint()
        half_trunk = getattr(self.encoder, "half_trunk", None)
        if half_trunk is None:
            raise ValueError(f"architecture {self.architecture!r} has no float16 mode: use float32")
        half_trunk()
        self.precision = precision

    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> float32 logits (B,V,h,w)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images of dtype {images.dtype} and shape {tuple(images.shape)}: "
                "uint8 (B,3,H,W) expected"
            )
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels do not divide into "
                f"tokens of {self.stride}x{self.stride}"
            )
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.encoder(pixels)
        return logits

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> token_ids int64 (B, h*w), row-major, by argmax on the device."""
        return self.logits(images).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, token_ids: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """token_ids int (B, h*w) -> uint8 (B,3,H,W). `grid_size` where it is not the configured."""
        if self.decoder is None:
            raise ValueError("this tokenizer was saved without a decoder: import decoder.pkl too")
        height, width = grid_size or self.grid_size
        if token_ids.ndim != 2 or token_ids.shape[1] != height * width:
            raise ValueError(
                f"token_ids of shape {tuple(token_ids.shape)} do not fill a {height}x{width} grid"
            )
        one_hot = F.one_hot(token_ids.long(), self.vocab_size).to(torch.float32)
        one_hot = one_hot.transpose(1, 2).reshape(-1, self.vocab_size, height, width)
        outputs: Tensor = self.decoder(one_hot)
        return unmap_pixels(torch.sigmoid(outputs[:, :3].float()))
