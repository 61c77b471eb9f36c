"""Raw patches by their nearest k-means centre: the plainest tokenizer of pixels, as a control."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.base import ImageTokenizer, Precision
from beit.tokenizers.clustering import kmeans


class KmeansTokenizer(ImageTokenizer):
    """A token is the centre at the least squared distance from its patch's pixels.

    `centres` (V, 3 * patch_size^2) are patches in [0, 1], channels first; `decode` lays them out.
    Always float32: it is one product, and rounding would move patches between centres.
    """

    architecture: ClassVar[str] = "kmeans"
    pixel_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)

    def __init__(self, *, image_size: int, patch_size: int, vocab_size: int) -> None:
        super().__init__(image_size=image_size, stride=patch_size, vocab_size=vocab_size)
        self.centres = nn.Parameter(torch.rand(vocab_size, 3 * patch_size**2), requires_grad=False)

    def model_config(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "patch_size": self.stride,
            "vocab_size": self.vocab_size,
        }

    @property
    def has_decoder(self) -> bool:
        return True

    @torch.no_grad()
    def fit(self, images: Tensor, *, generator: torch.Generator, num_iterations: int = 25) -> None:
        """Places the centres by the patches of `images`, uint8 (B,3,H,W).

        Raises ValueError for fewer patches than codes.
        """
        patches = unit_patches(images, self.stride).movedim(1, -1).flatten(0, 2)
        centres, _ = kmeans(
            patches, self.vocab_size, generator=generator, num_iterations=num_iterations
        )
        self.centres.copy_(centres)
        self._fingerprint = None

    def logits(self, images: Tensor) -> Tensor:
        """Minus the squared distances."""
        self.check_images(images)
        # Around the middle grey, for the sake of float32: |x|^2 - 2xc + |c|^2 cancels.
        patches, centres = unit_patches(images, self.stride) - 0.5, self.centres - 0.5
        # (V, D) @ (B, D, h*w) -> (B, V, h*w) -> (B, V, h, w)
        likeness = (2 * centres @ patches.flatten(2)).view(-1, self.vocab_size, *patches.shape[2:])
        offsets = centres.square().sum(1)[:, None, None]
        return likeness - offsets - patches.square().sum(1, keepdim=True)

    @torch.no_grad()
    def decode(self, token_ids: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        grid = grid_size or self.grid_size
        self.check_tokens(token_ids, grid)
        # (B, h*w, D) -> (B, D, h, w) -> (B, 3, H, W)
        patches = self.centres[token_ids.long()].transpose(1, 2)
        patches = patches.reshape(len(token_ids), -1, *grid)
        pixels = F.pixel_shuffle(patches, self.stride).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8)


def unit_patches(images: Tensor, patch_size: int) -> Tensor:
    """uint8 (B,3,H,W) -> float32 (B, 3*patch_size^2, h, w) in [0, 1], channels first."""
    return F.pixel_unshuffle(images.to(torch.float32) / 255, patch_size)
