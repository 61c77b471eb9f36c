"""The architecture that a file's tensors belong to: sizes, positions and heads read off shapes."""

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

TABLE = "relative_position_bias_table"
HEAD_DIM = 64  # of every published size


def infer_config(
    state: Mapping[str, Tensor],
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    source: str = "state",
) -> dict[str, Any]:
    """Constructor arguments of the network whose (official) tensors these are.

    `vocab_size` or `num_classes` says which class. Layer scale's initial value cannot be read
    off trained weights: base's 0.1 stands for it. ValueError if the sizes cannot be told.
    """
    try:
        dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{source}: not a BEiT; no usable {error}. Give weights of BEiT, BEiT v2 or MAE; a "
            "tokenizer's go to beit import-tokenizer"
        ) from error
    blocks = {int(n.split(".")[1]) for n in state if re.match(r"blocks\.\d+\.", n)}
    tables = [value for name, value in state.items() if name.endswith(TABLE)]
    if tables:
        heads = tables[0].shape[1]
    elif num_heads is not None or dim % HEAD_DIM == 0:
        heads = num_heads or dim // HEAD_DIM
    else:
        raise ValueError(f"{source}: dim {dim} is no multiple of {HEAD_DIM}; give num_heads")
    if image_size is None:
        side = square_side(state)
        if not side:
            raise ValueError(
                f"{source}: the patch grid is not square or has no positions; give image_size"
            )
        image_size = side * patch_size
    config: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": max(blocks) + 1,
        "num_heads": heads,
        "mlp_ratio": hidden / dim,
        "absolute_positions": "pos_embed" in state,
        "relative_positions": "none",
        "layer_scale_init": 0.1 if "blocks.0.gamma_1" in state else None,
    }
    if f"rel_pos_bias.{TABLE}" in state:
        config["relative_positions"] = "shared"
    elif f"blocks.0.attn.{TABLE}" in state:
        config["relative_positions"] = "per_block"
    if "fc_norm.weight" in state or "head.weight" in state:
        head = state.get("head.weight")
        pooling = "mean" if "fc_norm.weight" in state else "cls"
        return {**config, "num_classes": 0 if head is None else len(head), "pooling": pooling}
    head = state.get("lm_head.weight")
    return {**config, "vocab_size": 0 if head is None else len(head)}


def square_side(state: Mapping[str, Tensor]) -> int:
    """Side of a square patch grid, 0 where it is not square or tensors do not tell."""
    tables = [value for name, value in state.items() if name.endswith(TABLE)]
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        if side * side == state["pos_embed"].shape[1] - 1:
            return side
    elif tables:
        span = math.isqrt(tables[0].shape[0] - 3)
        if span * span == tables[0].shape[0] - 3 and span % 2:
            return (span + 1) // 2
    return 0


def options_of(args: Any) -> Mapping[str, Any]:
    """The options beside an official file's tensors; empty where they are in no form we know."""
    if isinstance(args, Namespace):
        return vars(args)
    return args if isinstance(args, Mapping) else {}


#: Options beside a file's tensors that tell what these do not: ours, and their names there. The
#: first is the official code's, which reads none of them in loading.
_UNTOLD = {
    "early_layer": "early_layers",
    "num_heads": "num_heads",
    "decoder_heads": "decoder_heads",
}


def told(args: Any, name: str) -> int | None:
    """A count that the options beside an official file's tensors tell, or None."""
    value = options_of(args).get(name)
    return value if isinstance(value, int) and value > 0 else None


def untold(model: nn.Module) -> dict[str, int]:
    """What the tensors of `model` do not tell of it, as options of an official file."""
    return {there: getattr(model, ours) for ours, there in _UNTOLD.items() if hasattr(model, ours)}


def aggregation(state: Mapping[str, Tensor], args: Any, depth: int) -> dict[str, int]:
    """What `BeitV2MIM` needs besides, of tensors and the options that the file was trained with."""
    layers = {int(n.split(".")[1]) for n in state if n.startswith("cls_pt_layers.")}
    early_layer = told(args, "early_layers") or max(1, depth - 3)
    return {"early_layer": early_layer, "head_layers": max(layers) + 1}
