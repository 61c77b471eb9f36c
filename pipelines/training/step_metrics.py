"""What steps sum up to: on the device while they are done, over all workers once a period.

The device is read in `StepMetrics.reduce` only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.training.distributed import World


@dataclass(frozen=True, kw_only=True)
class Period:
    """Consecutive steps between two logs, summed over the workers: equal on all of them."""

    first_step: int
    losses: Sequence[float]
    """Of each step."""
    grad_norms: Sequence[float]
    samples: Sequence[str]
    """Of each step: which rows it took, see `sample_hash`."""
    items: float
    """What the losses are means over: masked patches, or images."""
    means: Mapping[str, float]
    """Of the loss over steps, of all other sums over items."""
    perplexity: float | None
    """exp(entropy) of the most likely codes; None, as the next, where nothing predicts any."""
    codes_used: int | None

    def per_step(self) -> dict[str, Any]:
        """What metrics.jsonl holds of each step."""
        return {
            "first_step": self.first_step,
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "samples": self.samples,
        }


class StepMetrics:
    """Sums of the steps of one period, kept on the device.

    A step's loss is this worker's share of the global mean, so that shares add up to it. `names`
    are those of the sums, the loss first; `num_codes` is None where nothing predicts codes.
    """

    def __init__(
        self,
        capacity: int,
        names: Sequence[str],
        num_codes: int | None,
        device: torch.device,
    ) -> None:
        self.names = names
        # Share of the loss, the other sums, items.
        self.sums = torch.zeros(capacity, len(names) + 1, device=device)
        self.norms = torch.zeros(capacity, device=device)
        self.counts: Tensor | None = None
        if num_codes is not None:
            self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.samples: list[int] = []
        self.steps = 0

    def add(self, loss: Tensor, sums: Tensor, codes: Tensor | None, items: int) -> None:
        """Adds a micro-batch of the current step.

        Args:
            loss: (), its share of the step's loss.
            sums: (K,) by `names`, over its items; the first one is not looked at.
            codes: int64 (M,), most likely codes.
            items: how many there are.
        """
        self.sums[self.steps, 0] += loss.detach()
        self.sums[self.steps, 1:-1] += sums[1:].detach()
        self.sums[self.steps, -1] += items
        if self.counts is not None and codes is not None:
            self.counts.index_add_(0, codes, torch.ones_like(codes))

    def close_step(self, norm: Tensor, row_ids: NDArray[np.int64]) -> None:
        """Ends the step: its gradient norm, and the rows this worker took."""
        self.norms[self.steps] = norm
        self.samples.append(sample_hash(row_ids))
        self.steps += 1

    def reduce(self, world: World, *, first_step: int) -> Period:
        """The period that began with `first_step`, over all workers; starts the next one."""
        count = self.steps
        samples = torch.tensor(self.samples, dtype=torch.int64, device=world.device)
        rows = world.sum(self.sums[:count].clone()).tolist()
        hashes = world.sum(samples).tolist()
        losses = [row[0] for row in rows]
        items = sum(row[-1] for row in rows)
        means = {"loss": sum(losses) / count}
        for column, name in enumerate(self.names[1:], start=1):
            means[name] = sum(row[column] for row in rows) / max(items, 1)
        perplexity, codes_used = None, None
        if self.counts is not None:
            counts = world.sum(self.counts.clone()).double()
            share = counts / counts.sum().clamp(min=1)
            perplexity = math.exp(float(-(share * share.clamp(min=1e-30).log()).sum()))
            codes_used = int((counts > 0).sum())
            self.counts.zero_()
        period = Period(
            first_step=first_step,
            losses=losses,
            grad_norms=self.norms[:count].tolist(),
            samples=[f"{value % 2**64:016x}" for value in hashes],
            items=items,
            means=means,
            perplexity=perplexity,
            codes_used=codes_used,
        )
        self.sums.zero_()
        self.samples, self.steps = [], 0
        return period


def sample_hash(row_ids: NDArray[np.int64]) -> int:
    """Identity of a set of rows as int64, such that the hashes of disjoint sets add up.

    The sum over workers therefore identifies the global batch, however it was divided.
    """
    x = row_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64).astype(np.int64))
