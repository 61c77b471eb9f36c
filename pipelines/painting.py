"""Tokens as pictures: by the tokenizer's decoder, or of the image patches nearest to its codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.tables import tokenizer_store

DECODED = "decoded from token ids alone"
PATCHED = "each token as the image patch nearest to its code; grey where none was seen"
UNSEEN = 128
"""Grey value of a code that no patch has."""


@dataclass(frozen=True)
class Painter:
    """Makes pictures of tokens."""

    paint: Callable[[Tensor], Tensor]
    """int64 (B, h*w) to uint8 (B, 3, H, W)."""
    note: str
    """How, for the reader of the picture."""


def open_painter(uri: str) -> Painter | None:
    """The painter of a stored tokenizer; None for one that has neither decoder nor patches.

    Raises:
        InputError: there is no tokenizer, or a damaged one.
    """
    tokenizer = tokenizer_store.load(uri)
    if tokenizer.has_decoder:
        return Painter(tokenizer.decode, DECODED)
    patches = tokenizer_store.load_patches(uri)
    if patches is None:
        return None
    grid_size = tokenizer.grid_size
    return Painter(lambda token_ids: patchwork(token_ids, patches, grid_size), PATCHED)


def patchwork(token_ids: Tensor, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Token ids (B, h*w) as the patches (V, 3, s, s) of their codes: uint8 (B, 3, h*s, w*s)."""
    side = patches.shape[-1]
    tiles = patches[token_ids.long()].view(-1, *grid_size, 3, side, side)
    # (B, h, w, 3, s, s) -> (B, 3, h, s, w, s)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def nearest_patches(
    images: Tensor, token_ids: Tensor, logits: Tensor, codes: Tensor, count: int
) -> Tensor:
    """The image patches that fit each code best: uint8 (len(codes), count, 3, s, s), best first.

    images uint8 (n, 3, H, W), their tokens and the tokens' logits (n, h*w). Grey where a code has
    fewer patches.
    """
    side = images.shape[3] // round(token_ids.shape[1] ** 0.5)
    columns = images.shape[3] // side
    # Grouped by code, the best first: stable sorts by logit, then by code.
    order = logits.flatten().argsort(descending=True, stable=True)
    order = order[token_ids.flatten()[order].argsort(stable=True)]
    sorted_codes = token_ids.flatten()[order]
    first = torch.searchsorted(sorted_codes, codes)
    last = torch.searchsorted(sorted_codes, codes, right=True)
    found = torch.full((len(codes), count, 3, side, side), UNSEEN, dtype=torch.uint8)
    for rank in range(count):
        there = (first + rank < last).nonzero().flatten()
        image, cell = _divided(order[first[there] + rank], token_ids.shape[1])
        y, x = cell // columns * side, cell % columns * side
        rows = y[:, None, None] + torch.arange(side)[None, :, None]
        across = x[:, None, None] + torch.arange(side)[None, None, :]
        # (M, s, s, 3) -> (M, 3, s, s)
        found[there, rank] = images[image[:, None, None], :, rows, across].movedim(3, 1)
    return found


def _divided(position: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return position // by, position % by
