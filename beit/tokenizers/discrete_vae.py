"""A discrete VAE as a tokenizer: an encoder to logits over codes, and a decoder back to pixels."""

from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.base import ImageTokenizer

PIXEL_MARGIN = 0.1
"""Half of what DALL-E's `map_pixels` cuts off [0, 1]: logit-Laplace needs values inside (0, 1)."""


def map_pixels(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> float32 in [0.1, 0.9], as unilm: ToTensor, then map_pixels."""
    return (1 - 2 * PIXEL_MARGIN) * (images.to(torch.float32) / 255) + PIXEL_MARGIN


def unmap_pixels(values: Tensor) -> Tensor:
    """The inverse of `map_pixels`: float (B,3,H,W) -> uint8, clamped and rounded."""
    unit = ((values.float() - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8)


class HalvedEncoder(Protocol):
    """What `round_weights` asks of an encoder."""

    def half_trunk(self) -> None:
        """float16 in all but the output convolution."""


class DiscreteVae(ImageTokenizer):
    """`encoder(pixels in [0.1, 0.9]) -> logits (B,V,h,w)`; `decoder(z (B,V,h,w)) -> (B,6,H,W)`.

    The latter are three maps of mu and three of ln b. The decoder may be missing (labels need
    none); `decode` then raises ValueError. float16 rounds the encoder's trunk, as OpenAI's code
    does on CUDA, and leaves the output convolution alone.
    """

    pixel_range: ClassVar[tuple[float, float]] = (PIXEL_MARGIN, 1 - PIXEL_MARGIN)

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        *,
        image_size: int,
        stride: int,
        vocab_size: int,
    ) -> None:
        super().__init__(image_size=image_size, stride=stride, vocab_size=vocab_size)
        self.encoder = encoder
        self.decoder = decoder

    @property
    def has_decoder(self) -> bool:
        return self.decoder is not None

    def round_weights(self) -> None:
        cast(HalvedEncoder, self.encoder).half_trunk()

    def logits(self, images: Tensor) -> Tensor:
        self.check_images(images)
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.encoder(pixels)
        return logits

    @torch.no_grad()
    def decode(self, token_ids: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        if self.decoder is None:
            raise ValueError("this tokenizer was saved without a decoder: import decoder.pkl too")
        height, width = grid_size or self.grid_size
        self.check_tokens(token_ids, (height, width))
        one_hot = F.one_hot(token_ids.long(), self.vocab_size).to(torch.float32)
        one_hot = one_hot.transpose(1, 2).reshape(-1, self.vocab_size, height, width)
        outputs: Tensor = self.decoder(one_hot)
        return unmap_pixels(torch.sigmoid(outputs[:, :3].float()))
