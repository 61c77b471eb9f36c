"""Mixup and CutMix of a batch, drawn as values.

Each image meets the one at the mirrored place of its batch, and all of a batch in one way; the
label of each counts as much as is seen of it. Provenance: arXiv 1710.09412, arXiv 1905.04899, in
`batch` mode of timm (`timm/data/mixup.py`), as BEiT's recipes use it. There a batch is what one
GPU holds; the caller says here what it is, so that it need not depend on the number of them.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from beit import counters


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the images of a batch are mixed with those at the mirrored place."""

    share: float
    """How much the own label counts."""
    box: tuple[int, int, int, int] | None = None
    """Top, left, bottom, right of what is pasted (CutMix); None: pixels are blended (mixup)."""


def mix_of(
    *,
    seed: int,
    step: int,
    shard: int,
    size: tuple[int, int],
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> Mix | None:
    """The mix of the batch that is this shard of a step; None: it stays as it is.

    `mixup` and `cutmix` are the parameters of the beta distributions that shares are drawn from, 0
    for neither; `switch_probability` is that of CutMix where both are on; `size` is height and
    width in pixels.
    """
    if mixup <= 0 and cutmix <= 0:
        return None
    generator = counters.generator(seed, counters.MIXES, (step, shard, 0))
    mixes, switches, down, across = generator.random(4).tolist()
    if mixes >= probability:
        return None
    pastes = cutmix > 0 and (mixup <= 0 or switches < switch_probability)
    alpha = cutmix if pastes else mixup
    share = float(generator.beta(alpha, alpha))
    return pasted(share, size, (down, across)) if pastes else Mix(share=share)


def pasted(share: float, size: tuple[int, int], centre: tuple[float, float]) -> Mix:
    """CutMix that leaves about `share` of an image; `centre` of the box in [0, 1)."""
    edges = []
    for side, where in zip(size, centre, strict=True):
        cut, middle = int(side * math.sqrt(1 - share)), int(where * side)
        edges.append((max(0, middle - cut // 2), min(side, middle + (cut + 1) // 2)))
    (top, bottom), (left, right) = edges
    # What the image's edge cuts off counts for the own label.
    seen = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
    return Mix(share=seen, box=(top, left, bottom, right))


def mixed(pixels: Tensor, mix: Mix) -> Tensor:
    """Pixels float (B, 3, H, W) of a batch, mixed."""
    partners = pixels.flip(0)
    if mix.box is None:
        return pixels * mix.share + partners * (1 - mix.share)
    top, left, bottom, right = mix.box
    out = pixels.clone()
    out[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return out
