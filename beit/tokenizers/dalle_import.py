"""Published DALL-E weights, in any of their layouts, as a `DalleTokenizer`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from beit.tokenizers.dalle import DalleTokenizer
from beit.tokenizers.torch_file import assert_finite

FLAVA_PREFIX = "image_codebook."
_LAYOUT = "blocks.input, blocks.group_1 ... blocks.group_4, blocks.output.conv"


def openai_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's keys, float32, from OpenAI's or FLAVA's; other tensors of a whole FLAVA are left.

    FLAVA inserts `group.` and `path.` and names parameters weight and bias (transformers,
    convert_dalle_to_flava_codebook.py). Raises ValueError where there are no such keys.
    """
    if any(name.startswith(FLAVA_PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(FLAVA_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(FLAVA_PREFIX)
        }
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(blocks\.group_\d)\.group\.", r"\1.", name)  # noqa: PLW2901
        name = name.replace(".res_path.path.", ".res_path.")  # noqa: PLW2901
        name = re.sub(r"\.weight$", ".w", name)  # noqa: PLW2901
        name = re.sub(r"\.bias$", ".b", name)  # noqa: PLW2901
        renamed[name] = tensor.to(torch.float32)
    if "blocks.input.w" not in renamed or "blocks.output.conv.w" not in renamed:
        some = ", ".join(sorted(renamed)[:3])
        raise ValueError(
            f"no DALL-E network: {_LAYOUT} expected, found {some or 'nothing'}, ...; give "
            "encoder.pkl, a copy of it, or a VQ-KD file"
        )
    assert_finite(renamed)
    return renamed


def role_of(tensors: Mapping[str, Tensor]) -> str:
    """ "encoder" or "decoder", by the channels of the first convolution."""
    return "encoder" if tensors["blocks.input.w"].shape[1] == 3 else "decoder"


def tokenizer_from(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor] | None, *, image_size: int
) -> DalleTokenizer:
    """Build the tokenizer around both state dicts (OpenAI's layout), strictly.

    Raises ValueError naming missing, unexpected or misshapen tensors, and for an encoder and a
    decoder that do not belong together.
    """
    sizes = _sizes(encoder)
    if decoder is not None:
        other = _sizes(decoder)
        if other["vocab_size"] != sizes["vocab_size"]:
            raise ValueError(
                f"the encoder has {sizes['vocab_size']} codes, the decoder "
                f"{other['vocab_size']}: they do not belong together"
            )
        sizes = {**other, **sizes}
    with torch.device("meta"):
        tokenizer = DalleTokenizer(image_size=image_size, has_decoder=decoder is not None, **sizes)
    parts = [(tokenizer.encoder, encoder, "encoder")]
    if decoder is not None and tokenizer.decoder is not None:
        parts.append((tokenizer.decoder, decoder, "decoder"))
    for module, tensors, role in parts:
        try:
            module.load_state_dict(dict(tensors), strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"not the weights of a DALL-E {role}: {error}") from error
    tokenizer.requires_grad_(requires_grad=False)
    return tokenizer.eval()


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    first, last = tensors["blocks.input.w"], tensors["blocks.output.conv.w"]
    if first.ndim != 4 or last.ndim != 4:
        raise ValueError("no DALL-E network: the weights of a convolution have four dimensions")
    blocks = {
        match[1] for name in tensors if (match := re.match(r"blocks\.group_1\.block_(\d+)\.", name))
    }
    common = {"blocks_per_group": max(1, len(blocks))}
    if role_of(tensors) == "encoder":
        return {**common, "hidden_dim": first.shape[0], "vocab_size": last.shape[0]}
    return {
        **common,
        "hidden_dim": last.shape[1],
        "init_dim": first.shape[0],
        "vocab_size": first.shape[1],
    }
