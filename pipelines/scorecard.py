"""How well a tokenizer serves a set of images, and the gate that stops a collapsed one.

Numbers on real pictures before GPU days are spent on their tokens: how much of the codebook is
used, what the decoder makes of the tokens, and how predictable tokens are from one another.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit.tokenizers import ImageTokenizer
from beit.views import ViewPolicy
from pipelines.errors import StageFailed
from pipelines.painting import nearest_patches, patchwork
from pipelines.reading.pixels import drawn, read_pixels
from pipelines.tables.image_table import ImageTable

SCORE_VIEW = 2**48
"""Index of the view that is scored: one that neither training nor a token table ever uses."""
NUM_PICTURES = 8
NEAREST_IMAGES = 1024
NUM_CODES, NUM_EXAMPLES = 24, 8
MAX_GROUPS = 64


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What the tokens of some images say about a codebook; entropies in nats.

    Plain frequencies of few tokens make a large vocabulary look more orderly than it is. The
    unigram entropy carries the Miller-Madow correction, (codes seen - 1) / (2 tokens). For pairs,
    of which most are never seen, that is far too little: what neighbours seem to tell of each
    other after shuffling is taken off what they seem to tell before.
    """

    num_tokens: int
    vocab_size: int
    codes_used: int
    """Codes that occur at least once."""
    perplexity: float
    """exp(unigram entropy), uncorrected: the number of codes equally used tokens would need."""
    top_share: float
    """Share of the most frequent code."""
    unigram_entropy: float
    """Of a token by itself: the loss of the best constant guess."""
    neighbour_entropy: float
    """Of a token given its left or upper neighbour (mean of both); the less, the more context
    explains. On the high side where images are few for the vocabulary."""

    @property
    def dead_codes(self) -> int:
        """Codes that never occur."""
        return self.vocab_size - self.codes_used


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """Image patches nearest to codes, among those of the first NEAREST_IMAGES images."""

    patches: Tensor
    """uint8 (vocab_size, 3, s, s): one for each code; grey where no image has it."""
    codes: Tensor
    """int64 (C,): a few of the codes in use, from the most frequent one to the rarest."""
    examples: Tensor
    """uint8 (C, NUM_EXAMPLES, 3, s, s): the patches nearest to each of these, best first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorecard:
    """Token statistics and reconstruction of one tokenizer on one sample of images."""

    num_images: int
    tokens: TokenStatistics
    mse: float | None
    """Mean squared error of decode(encode(image)), pixels in [0, 1]; None without a decoder."""
    mae: float | None
    """Mean absolute error, likewise."""
    counts: np.ndarray
    """int64 (vocab_size,): how often each code occurs."""
    images: np.ndarray
    """uint8 (P, 3, H, W): a few of the images, for pictures."""
    reconstructions: np.ndarray
    """uint8 (P, 3, H, W): what the decoder makes of their tokens, or the nearest patches."""
    token_ids: np.ndarray
    """int64 (P, h, w): the tokens of these few images."""
    nearest: Nearest | None
    """What codes stand for, where there is no decoder to show it."""

    @property
    def psnr(self) -> float | None:
        """Peak signal-to-noise ratio in dB."""
        return None if self.mse is None else -10 * math.log10(max(self.mse, 1e-12))

    def metrics(self) -> dict[str, float]:
        """The numbers, for manifests and tracking."""
        values: dict[str, float | None] = {
            "num_images": self.num_images,
            "num_tokens": self.tokens.num_tokens,
            "vocab_size": self.tokens.vocab_size,
            "codes_used": self.tokens.codes_used,
            "dead_codes": self.tokens.dead_codes,
            "perplexity": self.tokens.perplexity,
            "top_share": self.tokens.top_share,
            "unigram_entropy": self.tokens.unigram_entropy,
            "neighbour_entropy": self.tokens.neighbour_entropy,
            "mse": self.mse,
            "mae": self.mae,
            "psnr": self.psnr,
        }
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """One line for people."""
        tokens = self.tokens
        line = (
            f"{tokens.codes_used} of {tokens.vocab_size} codes used, perplexity "
            f"{tokens.perplexity:.1f}, entropy {tokens.unigram_entropy:.2f} nats alone and "
            f"{tokens.neighbour_entropy:.2f} given a neighbour"
        )
        if self.mse is not None and self.psnr is not None:
            line += f"; reconstruction error {self.mse:.4f} ({self.psnr:.1f} dB)"
        return f"{line} on {self.num_images} images"


def token_statistics(token_ids: np.ndarray, vocab_size: int) -> TokenStatistics:
    """Statistics of token grids (M, h, w). Raises ValueError for an empty or out-of-range input."""
    if token_ids.size == 0 or token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(f"token_ids must be non-empty and in [0, {vocab_size})")
    grids = token_ids.astype(np.int64)
    _, counts = np.unique(grids, return_counts=True)
    conditional = [
        _conditional_entropy(before.ravel(), after.ravel(), vocab_size)
        for before, after in (
            (grids[:, :, :-1], grids[:, :, 1:]),
            (grids[:, :-1, :], grids[:, 1:, :]),
        )
        if before.size
    ]
    return TokenStatistics(
        num_tokens=grids.size,
        vocab_size=vocab_size,
        codes_used=len(counts),
        perplexity=math.exp(_entropy(counts, corrected=False)),
        top_share=float(counts.max() / counts.sum()),
        unigram_entropy=_entropy(counts),
        neighbour_entropy=float(np.mean(conditional)) if conditional else _entropy(counts),
    )


def _entropy(counts: np.ndarray, *, corrected: bool = True) -> float:
    shares = counts / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return entropy + (len(counts) - 1) / (2 * float(counts.sum())) * corrected


def _conditional_entropy(before: np.ndarray, after: np.ndarray, vocab_size: int) -> float:
    shuffled = np.random.default_rng(0).permutation(after)
    information = _information(before, after, vocab_size)
    chance = _information(before, shuffled, vocab_size)
    _, counts = np.unique(after, return_counts=True)
    return max(0.0, _entropy(counts) - max(0.0, information - chance))


def _information(before: np.ndarray, after: np.ndarray, vocab_size: int) -> float:
    """Mutual information by plain frequencies, in nats."""

    def entropy(values: np.ndarray) -> float:
        return _entropy(np.unique(values, return_counts=True)[1], corrected=False)

    return entropy(before) + entropy(after) - entropy(before * vocab_size + after)


def score(
    tokenizer: ImageTokenizer,
    images: ImageTable,
    *,
    num_images: int,
    policy: ViewPolicy | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> Scorecard:
    """Score a tokenizer (on `device`) on images spread evenly over the table.

    One random view of each by `policy`; the same images and views whenever it is asked.
    """
    rows = sample_rows(images, num_images)
    batches = read_pixels(
        images,
        rows,
        drawn(policy or ViewPolicy(), SCORE_VIEW),
        tokenizer.image_size,
        tokenizer.interpolation,
        batch_size=batch_size,
    )
    return score_batches(tokenizer, map(torch.from_numpy, batches), device=device)


def score_batches(
    tokenizer: ImageTokenizer, batches: Iterable[Tensor], *, device: str | torch.device = "cpu"
) -> Scorecard:
    """Score a tokenizer on uint8 batches (B,3,H,W)."""
    seen = _Seen()
    reconstructions: list[np.ndarray] = []
    squared = absolute = 0.0
    num_values = 0
    for batch in batches:
        token_ids, logits = tokenizer.match(batch.to(device))
        # Of a tokenizer with a decoder only what is shown is kept.
        kept = NUM_PICTURES if tokenizer.has_decoder else NEAREST_IMAGES
        shown = seen.add(batch, token_ids.cpu(), logits.cpu(), limit=kept)
        if not tokenizer.has_decoder:
            continue
        decoded = tokenizer.decode(token_ids).cpu()
        difference = (decoded.float() - batch.float()) / 255
        squared += float(difference.square().sum())
        absolute += float(difference.abs().sum())
        num_values += difference.numel()
        reconstructions.append(decoded[:shown].numpy())
    token_ids = torch.cat(seen.token_ids)
    grids = token_ids.view(-1, *tokenizer.grid_size).numpy()
    counts = np.bincount(grids.ravel(), minlength=tokenizer.vocab_size)
    images = torch.cat(seen.images)
    nearest = None
    if not tokenizer.has_decoder:
        nearest = _nearest(images, token_ids[: len(images)], torch.cat(seen.logits), counts)
        painted = patchwork(token_ids[:NUM_PICTURES], nearest.patches, tokenizer.grid_size)
        reconstructions.append(painted.numpy())
    return Scorecard(
        num_images=len(grids),
        tokens=token_statistics(grids, tokenizer.vocab_size),
        mse=squared / num_values if num_values else None,
        mae=absolute / num_values if num_values else None,
        counts=counts,
        images=images[:NUM_PICTURES].numpy(),
        reconstructions=np.concatenate(reconstructions),
        token_ids=grids[:NUM_PICTURES],
        nearest=nearest,
    )


class _Seen:
    """Tokens of all images; pixels and logits of the first ones."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.token_ids: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, images: Tensor, token_ids: Tensor, logits: Tensor, *, limit: int) -> int:
        """Takes a batch over, and says of how many of its images the pixels were kept."""
        kept = min(len(images), limit - sum(len(some) for some in self.images))
        self.images.append(images[:kept])
        self.logits.append(logits[:kept])
        self.token_ids.append(token_ids)
        return kept


def _nearest(images: Tensor, token_ids: Tensor, logits: Tensor, counts: np.ndarray) -> Nearest:
    used = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    codes = torch.from_numpy(used[evenly_spaced(len(used), NUM_CODES)])
    every = torch.arange(len(counts))
    return Nearest(
        patches=nearest_patches(images, token_ids, logits, every, 1)[:, 0],
        codes=codes,
        examples=nearest_patches(images, token_ids, logits, codes, NUM_EXAMPLES),
    )


def check_gate(scorecard: Scorecard, *, min_perplexity: float, min_codes: int, remedy: str) -> None:
    """Refuse a collapsed tokenizer.

    Raises:
        StageFailed: naming the figure, the bound that it missed and `remedy`.
    """
    tokens = scorecard.tokens
    for name, value, bound, field in (
        ("perplexity", tokens.perplexity, min_perplexity, "min_perplexity"),
        ("codes used", tokens.codes_used, min_codes, "min_codes"),
    ):
        if value < bound:
            raise StageFailed(
                f"the tokenizer has collapsed: {name} {value:.4g} of {tokens.vocab_size} codes is "
                f"below gate.{field} = {bound:g} on {scorecard.num_images} images; {remedy}"
            )


def evenly_spaced(num_rows: int, count: int) -> np.ndarray:
    """At most `count` distinct row ids spread over [0, num_rows), ascending."""
    count = min(count, num_rows)
    return (np.arange(count) * num_rows) // max(count, 1)


def sample_rows(images: ImageTable, count: int) -> np.ndarray:
    """About `count` (at most) row ids spread over the table, ascending, from few row groups.

    A row group is read whole, so of a large table only MAX_GROUPS of them are touched.
    """
    groups = images.row_groups
    if len(groups) <= MAX_GROUPS:
        return evenly_spaced(images.num_rows, count)
    each = -(-count // MAX_GROUPS)
    rows = [
        groups.starts[group] + evenly_spaced(int(groups.sizes[group]), each)
        for group in evenly_spaced(len(groups), MAX_GROUPS)
    ]
    return np.concatenate(rows)[:count]


def scorecard_record(scorecard: Scorecard) -> dict[str, Any]:
    """The scorecard for a manifest: figures rounded so that they read well and compare equal."""
    return {
        name: int(value) if float(value).is_integer() else round(float(value), 6)
        for name, value in scorecard.metrics().items()
    }
