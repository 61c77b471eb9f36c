"""Raw patches by a random projection and a random codebook, neither ever trained: a control.

Provenance: BEST-RQ (Chiu et al., arXiv 2202.01855, section 3), which says that the inputs must be
standardised or a few codes take everything; so each pixel of a patch is, by means and deviations
of sample images. The rest follows from a seed.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.base import ImageTokenizer, Precision
from beit.tokenizers.kmeans import unit_patches

LEAST_DEVIATION = 1e-3
"""Of a pixel in [0, 1]: one that never varies must not decide by its rounding."""


class ProjectionTokenizer(ImageTokenizer):
    """A token is the code at the smallest angle from the projected patch.

    Always float32, as raw patches are cheap and ties would be many. There is nothing to decode
    with: a code stands for a direction, not for a patch.
    """

    architecture: ClassVar[str] = "projection"
    pixel_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)

    def __init__(
        self, *, image_size: int, patch_size: int, vocab_size: int, code_dim: int = 32
    ) -> None:
        super().__init__(image_size=image_size, stride=patch_size, vocab_size=vocab_size)
        dim = 3 * patch_size**2
        matrix = torch.randn(code_dim, dim) / math.sqrt(dim)
        codebook = F.normalize(torch.randn(vocab_size, code_dim), dim=1)
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.codebook = nn.Parameter(codebook, requires_grad=False)
        self.mean = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(dim), requires_grad=False)

    def model_config(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "patch_size": self.stride,
            "vocab_size": self.vocab_size,
            "code_dim": self.matrix.shape[0],
        }

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Takes means and deviations of the pixels of patches from `images`, uint8 (B,3,H,W)."""
        patches = unit_patches(images, self.stride).movedim(1, -1).flatten(0, 2)
        deviation, mean = torch.std_mean(patches, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=LEAST_DEVIATION))
        self._fingerprint = None

    def logits(self, images: Tensor) -> Tensor:
        """Cosines of the angles."""
        self.check_images(images)
        patches = unit_patches(images, self.stride)
        grid = patches.shape[2:]
        standard = (patches.flatten(2) - self.mean[:, None]) / self.deviation[:, None]
        # (code_dim, D) @ (B, D, h*w), then (V, code_dim) @ (B, code_dim, h*w) -> (B, V, h, w)
        projected = F.normalize(self.matrix @ standard, dim=1)
        return (self.codebook @ projected).view(-1, self.vocab_size, *grid)
