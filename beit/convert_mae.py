"""MAE's files, to and from ours: the official layout, and that of transformers' `ViTMAE…`.

The official names (facebookresearch/mae, `models_mae.py`) are those of timm's plain vision
transformer, and differ from ours in one place: queries, keys and values have one bias, of which
the part of the keys changes nothing (see `beit.mae`). It is left out in reading and zero in
writing. A file without the decoder holds an encoder: a `BeitMIM` without a head.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from beit.classifier import BeitClassifier
from beit.convert import BLOCK_NAMES, State, swap
from beit.infer_config import HEAD_DIM, untold
from beit.mae import MaeNetwork
from beit.mim import BeitMIM
from beit.weights import check_state

MaeLike: TypeAlias = MaeNetwork | BeitMIM

DECODER_HEAD_DIM = 32  # of every published size
_TOP_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
    ("decoder_", "decoder.decoder_"),
    ("mask_token", "decoder.mask_token"),
)
# transformers 5 writes the decoder's blocks as the latter; published files have the former.
_THEIR_BLOCK = re.compile(
    r"(?:(?P<encoder>(?:vit\.)?encoder\.layer)|decoder\.decoder_(?:layers|encoder\.layer))"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)


def is_mae(tensors: Mapping[str, Any]) -> bool:
    """Whether these are names of a plain vision transformer, as the official files have them."""
    return "blocks.0.attn.qkv.bias" in tensors


def from_mae(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    source: str = "MAE state",
) -> MaeLike:
    """The network of an official file's tensors, for square images.

    `num_heads` is needed where heads are not 64 wide, `decoder_heads` where the decoder's are not
    32 wide. ValueError lists what is missing, unknown or misshapen; a classifier's head is unknown.
    """
    ours: State = {}
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value_bias = value.chunk(3)
            stem = name.removesuffix("qkv.bias")
            ours[f"{stem}q_bias"], ours[f"{stem}v_bias"] = query.clone(), value_bias.clone()
        else:
            ours[name] = value
    return _built(ours, num_heads=num_heads, decoder_heads=decoder_heads, source=source)


def to_mae(model: MaeLike | BeitClassifier) -> dict[str, Any]:
    """What the official code loads: `model`, the tensors; beside them `args`, as `to_unilm`.

    Of an encoder alone, what its fine-tuning takes (and timm as a plain vision transformer).
    ValueError for a classifier, and for an encoder that is none of MAE's: with relative positions
    or layer scale.
    """
    if isinstance(model, BeitClassifier):
        raise ValueError(  # noqa: TRY004 - a format that was asked for
            "an MAE file has no place for a classifier's head: use format unilm, hf or timm"
        )
    if model.pos_embed is None or model.relative_positions != "none" or model.layer_scale_init:
        raise ValueError(
            "an MAE file has absolute positions, no relative ones and no layer scale; this network "
            "is another: use format unilm, or hf with --encoder_only true"
        )
    joined: State = {}
    own = model.state_dict()
    for name, value in own.items():
        if name.endswith("attn.q_bias"):
            rest = own[name.replace("q_bias", "v_bias")]
            bias = torch.cat([value, torch.zeros_like(value), rest])
            joined[name.replace("q_bias", "qkv.bias")] = bias
        elif not name.endswith("attn.v_bias"):
            joined[name] = value
    if isinstance(model, BeitMIM):
        joined = {n: v for n, v in joined.items() if not n.startswith(("mask_token", "lm_head."))}
    return {"model": joined, "args": untold(model)}


def mae_to_huggingface(model: MaeNetwork) -> tuple[State, dict[str, Any]]:
    """Tensors and `config.json` of a folder that `ViTMAEForPreTraining` loads, named as published.

    Whether pixels were normalised is a matter of the loss, which a network does not know:
    `norm_pix_loss` is left out. ValueError as `to_mae`, and for a grid that is not square.
    """
    if model.grid_size[0] != model.grid_size[1]:
        raise ValueError(f"grid_size {model.grid_size} is not square, as that of a ViTMAE is")
    state: State = {}
    for name, value in to_mae(model)["model"].items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", name)
        if block is None:
            theirs = swap(name, _TOP_NAMES)
            state[theirs if theirs.startswith("decoder.") else f"vit.{theirs}"] = value
            continue
        stem = f"{'decoder.decoder_layers' if block[1] else 'vit.encoder.layer'}.{block[2]}."
        kind = block[3].removeprefix("attn.qkv.")  # weight or bias of three in one
        if kind == block[3]:
            state[stem + swap(kind, BLOCK_NAMES)] = value
            continue
        for part, own in zip(("query", "key", "value"), value.chunk(3), strict=True):
            state[f"{stem}attention.attention.{part}.{kind}"] = own
    return state, {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "image_size": model.image_size[0],
        "patch_size": model.patch_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": int(model.dim * model.mlp_ratio),
        "layer_norm_eps": model.norm_eps,
        "decoder_hidden_size": model.decoder_dim,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": model.decoder_heads,
        "decoder_intermediate_size": 4 * model.decoder_dim,
    }


def mae_from_huggingface(
    state: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str = "transformers state"
) -> MaeLike:
    """The network of a transformers folder of model type `vit_mae`."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{source}: hidden_act {config['hidden_act']!r} is not 'gelu'")
    parts: dict[str, dict[str, Tensor]] = {}
    ours: State = {}
    for name, value in state.items():
        block = _THEIR_BLOCK.fullmatch(name)
        if block is None:
            top = name.removeprefix("vit.")
            ours[swap(top, [(theirs, own) for own, theirs in _TOP_NAMES])] = value
            continue
        stem = f"{'blocks' if block['encoder'] else 'decoder_blocks'}.{block['number']}."
        split = re.fullmatch(r"attention\.attention\.(query|key|value)\.(.*)", block["rest"])
        if split:
            parts.setdefault(f"{stem}attn.qkv.{split[2]}", {})[split[1]] = value
        else:
            reverse = [(theirs, own) for own, theirs in BLOCK_NAMES]
            ours[stem + swap(block["rest"], reverse)] = value
    for name, three in parts.items():
        absent = [part for part in ("query", "key", "value") if part not in three]
        if absent:
            raise ValueError(f"{source} does not fit the network; no {', '.join(absent)} of {name}")
        ours[name] = torch.cat([three["query"], three["key"], three["value"]])
    heads = config.get("num_attention_heads")
    decoder_heads = config.get("decoder_num_attention_heads")
    network = from_mae(ours, num_heads=heads, decoder_heads=decoder_heads, source=source)
    return _renewed(network, norm_eps=config.get("layer_norm_eps", 1e-12))


def _built(
    ours: State, *, num_heads: int | None, decoder_heads: int | None, source: str
) -> MaeLike:
    try:
        dim, _, patch_size, _ = ours["patch_embed.proj.weight"].shape
        patches = ours["pos_embed"].shape[1] - 1
        hidden = ours["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: not an MAE; no usable {error}") from error
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{source}: {patches} positions are no square grid")
    if num_heads is None and dim % HEAD_DIM:
        raise ValueError(f"{source}: dim {dim} is no multiple of {HEAD_DIM}; give num_heads")
    options: dict[str, Any] = {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": _count(ours, "blocks."),
        "num_heads": num_heads or dim // HEAD_DIM,
        "mlp_ratio": hidden / dim,
        "absolute_positions": True,
        "relative_positions": "none",
        "layer_scale_init": None,
    }
    model: MaeLike
    if "decoder_pred.weight" in ours:
        decoder_dim = ours["decoder_pred.weight"].shape[1]
        model = MaeNetwork(
            **options,
            decoder_dim=decoder_dim,
            decoder_depth=_count(ours, "decoder_blocks."),
            decoder_heads=decoder_heads or max(1, decoder_dim // DECODER_HEAD_DIM),
        )
    else:
        model = BeitMIM(**options, vocab_size=0)
        ours = {"mask_token": torch.zeros(1, 1, dim), **ours}
    check_state(ours, model.state_dict(), source=source)
    model.load_state_dict(ours, strict=True)
    return model


def _renewed(model: MaeLike, **changes: Any) -> MaeLike:
    """The same weights in a network of other options."""
    again = type(model)(**{**model.config(), **changes})
    again.load_state_dict(model.state_dict())
    return again


def _count(state: State, prefix: str) -> int:
    blocks = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    return 1 + max((int(name.split(".")[0]) for name in blocks), default=-1)
