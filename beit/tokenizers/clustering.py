"""K-means: where codebooks start, and what a tokenizer of raw patches is."""

import torch
from torch import Tensor

MAX_POINTS = 32_768
POINTS_PER_CENTRE = 32
"""K-means looks at no more patches than the larger of MAX_POINTS and so many per centre."""


def kmeans(
    points: Tensor, num_centres: int, *, generator: torch.Generator, num_iterations: int
) -> tuple[Tensor, float]:
    """Lloyd's algorithm from spread-out seeds -> centres (num_centres, D), mean squared error.

    Seeds are drawn in rounds with probability proportional to the squared distance to the seeds so
    far (k-means||), so that a corner full of equal white patches gets one centre and not half of
    them. A centre that loses all its points moves to the worst-represented point. Of very many
    points a random share is used. Raises ValueError for fewer points than centres.
    """
    if len(points) < num_centres:
        raise ValueError(
            f"{len(points)} patches are too few to place {num_centres} codes: give more images "
            f"or lower vocab_size"
        )
    most = max(MAX_POINTS, POINTS_PER_CENTRE * num_centres)
    if len(points) > most:
        chosen = torch.randperm(len(points), generator=generator)[:most]
        points = points[chosen.to(points.device)]
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    nearest, _ = _nearest(points, centres)
    while len(centres) < num_centres:
        count = min(num_centres - len(centres), max(1, num_centres // 8))
        # A small floor keeps the draw possible when fewer distinct points exist than centres.
        chances = (nearest + 1e-8).cpu()
        chosen = torch.multinomial(chances, count, generator=generator).to(points.device)
        centres = torch.cat([centres, points[chosen]])
        nearest = torch.minimum(nearest, _nearest(points, points[chosen])[0])
    for _ in range(num_iterations):
        distance, assigned = _nearest(points, centres)
        counts = torch.bincount(assigned, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = points[distance.topk(len(empty)).indices]
    distance, _ = _nearest(points, centres)
    return centres, float(distance.mean())


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to, and index of, the nearest centre of each point."""
    offsets = centres.square().sum(1)
    # In bfloat16, as a training step may compute, near centres could not be told apart.
    with torch.autocast(points.device.type, enabled=False):
        found = [
            (chunk.square().sum(1, keepdim=True) - 2 * chunk @ centres.T + offsets).min(dim=1)
            for chunk in torch.split(points, 16_384)
        ]
    distances = torch.cat([distance for distance, _ in found]).clamp(min=0)
    return distances, torch.cat([index for _, index in found])
