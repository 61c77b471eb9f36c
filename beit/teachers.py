"""Teachers: frozen networks whose patch features a VQ-KD tokenizer learns to predict."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Normalisation = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A frozen network, and what must be known to ask it.

    Whoever makes one (`pipelines.teachers`) says which of a network's states are its features; a
    tokenizer learns from it if both have the same grid.
    """

    network: Callable[[Tensor], Tensor]
    """Normalised pixels (B, 3, S, S) to features (B, N, dim), row-major over the grid."""
    image_size: int
    """S: side of its input in pixels."""
    grid_size: tuple[int, int]
    dim: int
    mean: Normalisation
    std: Normalisation
    """Of pixels in [0, 1]."""
    name: str
    """What it is, for people and records: family and feature."""
    weights: str
    """Fingerprint of the weights."""
    fingerprint: str
    """Identity of weights and feature."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W), on the network's device -> float32 (B, N, dim).

        Views of another size than its own are resized (bicubic, antialiased): teacher and
        tokenizer always see one and the same view.
        """
        pixels = images.to(torch.float32) / 255
        if pixels.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        normalised = (pixels - _channels(self.mean, pixels)) / _channels(self.std, pixels)
        return self.network(normalised).float()


def _channels(values: Normalisation, like: Tensor) -> Tensor:
    """(3, 1, 1) on the device of `like`, without a copy from the host to wait for."""
    return torch.stack([like.new_full((1, 1), value) for value in values])
