"""Intervals over groups and seeds at once."""

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean in percent, and its 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(hits: np.ndarray, draws: int = 0) -> Estimate:
    """Share of hits.

    Args:
        hits: 0 or 1, (seeds, rows); every row is a group of its own.
        draws: of the bootstrap; 0: DRAWS.
    """
    return _estimate(hits.astype(np.float64), draws or DRAWS)


def difference(hits: np.ndarray, reference: np.ndarray) -> Estimate:
    """Points by which hits (seeds, rows) lie above those of the reference, on the same rows, seed
    by seed: what both find easy or hard cancels."""
    return _estimate(hits.astype(np.float64) - reference, DRAWS)


def _estimate(values: np.ndarray, draws: int) -> Estimate:
    """Bootstrap: seeds and rows are both drawn with replacement, with as many as there are.

    Rows that are alike in all seeds are one kind: how often each kind is drawn is all that counts.
    """
    draw = np.random.default_rng(0)
    seeds, rows = values.shape
    kinds, counts = np.unique(values, axis=1, return_counts=True)
    of_kinds = draw.multinomial(rows, counts / rows, draws) / rows
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    means = ((of_kinds @ kinds.T) * of_seeds).sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(100 * float(values.mean()), 100 * float(low), 100 * float(high))
