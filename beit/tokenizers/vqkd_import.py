"""Published VQ-KD weights (microsoft/unilm, `beit2/`) as a `VqkdTokenizer`.

A file holds encoder, decoder, both task layers, the quantiser's codebook with its statistics, and
perhaps the teacher. Tokens need encoder, task layer and codebook; the rest is read over, but only
by names that are known, so that a file of another kind is not taken for one.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.tokenizers.base import ImageTokenizer
from beit.tokenizers.torch_file import assert_finite
from beit.tokenizers.vqkd import VqkdTokenizer, num_heads_of

CODEBOOK = "quantize.embedding.weight"
POSITIONS = "encoder.pos_embed"
NEEDED = ("encoder.", "encode_task_layer.", CODEBOOK)
LEFT_OUT = ("decoder.", "decode_task_layer.", "quantize.", "loss", "teacher", "scaling")


def is_vqkd(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of such a file, going by their names."""
    return CODEBOOK in tensors and "encode_task_layer.0.weight" in tensors


def vqkd_from(tensors: Mapping[str, Tensor], *, image_size: int | None = None) -> ImageTokenizer:
    """The tokenizer of a file's tensors, float32, for inference.

    Sizes are those of the tensors; heads have 64 of the width each, as published. For another
    `image_size` than the file's, positions are resized.

    Raises:
        ValueError: names or shapes that such a file does not have, a grid that is not square, a
            codebook that was never placed, values that are not finite.
    """
    unknown = [name for name in tensors if not name.startswith((*NEEDED, *LEFT_OUT))]
    if unknown:
        raise ValueError(f"tensors that no VQ-KD file has: {', '.join(sorted(unknown)[:5])}")
    state = {_our_name(k): v.float() for k, v in tensors.items() if k.startswith(NEEDED)}
    sizes = _sizes(state)
    if image_size not in (None, sizes["image_size"]):
        sizes["image_size"] = image_size
        state[POSITIONS] = _resized(state[POSITIONS], image_size // sizes["patch_size"])
    tokenizer = VqkdTokenizer(**sizes)
    try:
        tokenizer.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the file does not fit a VQ-KD encoder: {error}") from error
    assert_finite(state)
    if not tokenizer.codebook.any():
        raise ValueError(f"{CODEBOOK} is all zeros: the file was saved before training began")
    return tokenizer.eval().requires_grad_(requires_grad=False)


def _resized(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1+N, dim) for a grid of `side` by `side`, as upstream's transformer reads them.

    Its scale is that of a grid larger by a tenth of a patch, which moves every point a little.
    """
    old = math.isqrt(positions.shape[1] - 1)
    patches = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def _our_name(name: str) -> str:
    for theirs, ours in (
        ("encoder.fc_norm.", "fc_norm."),
        ("encode_task_layer.", "task_layer."),
        (CODEBOOK, "codebook"),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The constructor's arguments, from shapes."""
    try:
        dim, _, patch_size, _ = state["encoder.patch_embed.proj.weight"].shape
        num_patches = state[POSITIONS].shape[1] - 1
        vocab_size, code_dim = state["codebook"].shape
    except KeyError as error:
        raise ValueError(f"no VQ-KD encoder: {error} is missing") from error
    except (ValueError, IndexError) as error:
        raise ValueError("no VQ-KD encoder: tensors have other shapes") from error
    side = round(num_patches**0.5)
    if side**2 != num_patches:
        raise ValueError(f"{POSITIONS} is of {num_patches} patches, which are no square")
    blocks = [int(n.split(".")[2]) for n in state if n.startswith("encoder.blocks.")]
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": 1 + max(blocks, default=0),
        "num_heads": num_heads_of(dim),
        "vocab_size": vocab_size,
        "code_dim": code_dim,
    }
