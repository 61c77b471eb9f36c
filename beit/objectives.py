"""Pretraining objectives: what is predicted of what is hidden, and the sums that a step adds up.

One loop trains them all: it hands an objective pixels, mask and targets, minimises the first of
the sums it gets back, and knows no more of it than `Objective` says. To add one, write another
class like `Beit` and name it where a configuration is turned into an objective.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit import flops
from beit.mim import BeitMIM, BeitV2MIM
from beit.vit import BeitEncoder


class Outcome(NamedTuple):
    """What a micro-batch adds to its step; everything on the device."""

    sums: Tensor
    """float32 (K,), over masked patches: `Objective.metrics`. The first one is minimised."""
    codes: Tensor | None
    """int64 (M,): most likely token of each masked patch; None where nothing predicts tokens."""


class Objective(nn.Module):
    """What the loop asks of a method. A module, since DDP and compile wrap it whole.

    Its parameters are those of `network`, which is called by its `forward`: FSDP gathers them
    there.
    """

    #: Names of the sums, "loss" first. Divided by the masked patches they are what is reported.
    metrics: ClassVar[tuple[str, ...]]
    #: What is optimised and checkpointed, whole; an encoder, which probes look into.
    network: BeitEncoder

    @property
    def num_branches(self) -> int:
        """Blocks with drop-path: the loop draws noise (B, num_branches, 2)."""
        raise NotImplementedError

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        targets: Tensor | None,
        *,
        num_masked: int,
        noise: Tensor | None,
    ) -> Outcome:
        """Sums over the masked patches of a micro-batch.

        pixels (B, 3, H, W) normalised; mask (B, N) bool, True = masked; targets int64
        (num_masked,), tokens of the masked patches, None without a token table; num_masked is
        `mask.sum()`, known on the host; noise as `num_branches` says.
        """
        raise NotImplementedError

    def predict(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Most likely token of every patch, masked or not: int64 (B, N).

        Where nothing predicts tokens: the images with masked patches painted, float32
        (B, 3, H, W), normalised as `pixels`.
        """
        raise NotImplementedError

    def export(self, weights: Mapping[str, Tensor]) -> BeitMIM:
        """The encoder to probe, fine-tune and publish: no decoder, no auxiliary head.

        `weights` is the state of `network`, whole and on the CPU; a sharded network has none.
        """
        raise NotImplementedError

    def flops_per_image(self, num_masked: float) -> float:
        """Floating-point operations of one image's forward and backward pass."""
        raise NotImplementedError


class TokenLoss(nn.Module):
    """Cross-entropy and hits of logits (M, V) on targets (M,), summed; and the likeliest tokens.

    A module of its own, since it is compiled: in one piece it passes over the logits once.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        codes = logits.detach().argmax(dim=-1)
        return loss, (codes == targets).sum(dtype=torch.float32), codes


class Beit(Objective):
    """BEiT: cross-entropy of the visual tokens of masked patches."""

    metrics = ("loss", "mim_accuracy")
    network: BeitMIM

    def __init__(self, network: BeitMIM) -> None:
        super().__init__()
        self.network = network
        self.token_loss = TokenLoss()

    @property
    def num_branches(self) -> int:
        return self.network.depth

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        targets: Tensor | None,
        *,
        num_masked: int,
        noise: Tensor | None,
    ) -> Outcome:
        assert targets is not None
        logits = self.network(pixels, mask, num_masked=num_masked, noise=noise)
        loss, correct, codes = self.token_loss(logits, targets)
        return Outcome(torch.stack((loss, correct)), codes)

    def predict(self, pixels: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels, mask, all_tokens=True)
        return logits.argmax(dim=-1)

    def export(self, weights: Mapping[str, Tensor]) -> BeitMIM:
        plain = BeitMIM(**self.network.config())
        plain.load_state_dict(weights)
        return plain

    def flops_per_image(self, num_masked: float) -> float:
        """The last block is evaluated at masked patches only, and counted so: MFU must not be
        flattered."""
        n = self.network
        tokens = n.num_patches + 1
        embedding = flops.patch_embedding(n.num_patches, n.patch_size, n.dim)
        blocks = (n.depth - 1) * flops.block(tokens, n.dim, n.mlp_ratio)
        last = flops.block(tokens, n.dim, n.mlp_ratio, rows=num_masked)
        head = flops.linear(num_masked, n.dim, n.vocab_size)
        return flops.with_backward(embedding + blocks + last + head, embedding)


class BeitV2(Objective):
    """BEiT v2: the same, and once more from the aggregation head; both weigh alike.

    `mim_accuracy` and the codes are those of the last block.
    """

    metrics = ("loss", "mim_accuracy", "main_loss", "aggregated_loss", "aggregated_accuracy")
    network: BeitV2MIM

    def __init__(self, network: BeitV2MIM) -> None:
        super().__init__()
        self.network = network
        self.token_loss = TokenLoss()

    @property
    def num_branches(self) -> int:
        return self.network.depth + len(self.network.cls_pt_layers)

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        targets: Tensor | None,
        *,
        num_masked: int,
        noise: Tensor | None,
    ) -> Outcome:
        assert targets is not None
        main, aggregated = self.network(pixels, mask, num_masked=num_masked, noise=noise)
        main_loss, correct, codes = self.token_loss(main, targets)
        loss, aggregated_correct, _ = self.token_loss(aggregated, targets)
        sums = (main_loss + loss, correct, main_loss, loss, aggregated_correct)
        return Outcome(torch.stack(sums), codes)

    def predict(self, pixels: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels, mask, all_tokens=True)
        return logits[0].argmax(dim=-1)

    def export(self, weights: Mapping[str, Tensor]) -> BeitMIM:
        return self.network.plain(weights)

    def flops_per_image(self, num_masked: float) -> float:
        n, head_layers = self.network, len(self.network.cls_pt_layers)
        tokens = n.num_patches + 1
        embedding = flops.patch_embedding(n.num_patches, n.patch_size, n.dim)
        blocks = (n.depth + head_layers - 2) * flops.block(tokens, n.dim, n.mlp_ratio)
        last = flops.block(tokens, n.dim, n.mlp_ratio, rows=num_masked + 1)
        last += flops.block(tokens, n.dim, n.mlp_ratio, rows=num_masked)
        head = flops.linear(2 * num_masked, n.dim, n.vocab_size)
        return flops.with_backward(embedding + blocks + last + head, embedding)
