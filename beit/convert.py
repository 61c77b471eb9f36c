"""BEiT state dictionaries of other libraries, to and from ours, strictly.

Ours are the official names (microsoft/unilm at 768a3c8), one layout for pretraining (`BeitMIM`)
and one for fine-tuning (`BeitClassifier`). The others:

- unilm files: the same, wrapped in `model` or `module`, with index buffers; those of BEiT v2 with
  an aggregation head;
- Hugging Face transformers: `BeitForMaskedImageModeling`, `BeitModel`,
  `BeitForImageClassification`, as `save_pretrained` writes them (4.x and 5.x write the same
  names; those of 5.x modules in memory are read too);
- timm: `timm.models.beit.Beit`.

A reader takes a state and gives a network; a writer the reverse. Every ValueError lists the
tensors that are missing, unknown or misshapen.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from beit.classifier import BeitClassifier, per_block_tables
from beit.infer_config import (
    TABLE,
    aggregation,
    infer_config,
    square_side,
    told,
    untold,
)
from beit.mim import BeitMIM, BeitV2MIM
from beit.position_bias import relative_position_index
from beit.weights import check_state

State: TypeAlias = dict[str, Tensor]
Network: TypeAlias = BeitMIM | BeitClassifier

# Inside a block: (ours, Hugging Face on disk).
BLOCK_NAMES = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    (f"attn.{TABLE}", f"attention.attention.relative_position_bias.{TABLE}"),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("gamma_1", "lambda_1"),
    ("gamma_2", "lambda_2"),
)
# Outside of blocks, relative to the `beit.` of a model with a head.
_ENCODER_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    (f"rel_pos_bias.{TABLE}", f"encoder.relative_position_bias.{TABLE}"),
    ("fc_norm.", "pooler.layernorm."),
    ("norm.", "layernorm."),
    ("head.", "classifier."),
)
_HEADS = ("lm_head.", "head.")  # neither these nor the norm before lm_head are inside `beit.`
_TIMM_POOL = {"mean": "avg", "cls": "token"}
# Module names that transformers 5 uses in memory, and what it writes for them.
_TRANSFORMERS_5 = (
    (r"\bshared_position_bias\.", "encoder.relative_position_bias."),
    (r"(\blayers\.\d+)\.relative_pos", r"\1.attention.attention.relative_pos"),
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\battention\.q_proj\.", "attention.attention.query."),
    (r"\battention\.k_proj\.", "attention.attention.key."),
    (r"\battention\.v_proj\.", "attention.attention.value."),
    (r"\battention\.o_proj\.", "attention.output.dense."),
    (r"\bmlp\.fc1\.", "intermediate.dense."),
    (r"\bmlp\.fc2\.", "output.dense."),
)  # fmt: skip


def from_unilm(
    state: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    source: str = "unilm state",
) -> Network:
    """The network of an official file: pretraining or fine-tuning layout, told by its head.

    Sizes are read off the tensors. `image_size` is used for grids that are not square and for
    a model without any position only; `num_heads` only without a bias table and with heads that are
    not 64 wide, where the file's `args` do not tell. A pretraining file of BEiT v2 becomes a
    `BeitV2MIM`; the layer from which its aggregation head takes patches is that of the `args`, else
    the third from the last, as published. A head of its own for the aggregated tokens
    (`cls_pt_lm_head`) is refused.
    """
    tensors = official_tensors(state)
    kept = {n: v for n, v in tensors.items() if not n.endswith("relative_position_index")}
    if isinstance(image_size, int) and square_side(kept):
        image_size = None  # the file tells its own
    heads = num_heads or told(state.get("args"), "num_heads")
    config = infer_config(kept, image_size=image_size, num_heads=heads, source=source)
    if "cls_pt_layers.0.norm1.weight" in kept:
        config |= aggregation(kept, state.get("args"), config["depth"])
    model = _build(config)
    check_state(kept, model.state_dict(), source=source)
    model.load_state_dict(tensors, strict=True)
    return model


def to_unilm(model: Network) -> dict[str, Any]:
    """What the official code loads strictly: `model`, the tensors, index buffers included.

    Beside them `args`, which it does not read: what tensors do not tell.
    """
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith(TABLE)]:
        index = relative_position_index(model.grid_size)
        state[name.replace(TABLE, "relative_position_index")] = index
    return {"model": state, "args": untold(model)}


def to_huggingface(
    model: Network, *, encoder_only: bool = False, class_names: Sequence[str] = ()
) -> tuple[State, dict[str, Any]]:
    """Tensors and `config.json` of a folder that `from_pretrained` loads.

    A `BeitMIM` becomes a BeitForMaskedImageModeling, a `BeitClassifier` a
    BeitForImageClassification; `encoder_only` gives a BeitModel, whose last_hidden_state is
    then `BeitMIM.features`. `class_names` are a classifier's, where they are known.

    ValueError for a grid that is not square (transformers lays out such a bias table
    differently, and its numbers would be wrong) and for an odd MLP width.
    """
    if model.grid_size[0] != model.grid_size[1]:
        raise ValueError(
            f"grid_size {model.grid_size} is not square: transformers computes another bias for "
            "it; resize the network with beit.positions.resize_positions first"
        )
    state: State = {}
    for name, value in model.state_dict().items():
        if encoder_only and name.startswith(_HEADS):
            continue
        outside = (*_HEADS, "norm.") if isinstance(model, BeitMIM) else _HEADS
        prefix = "" if encoder_only or name.startswith(outside) else "beit."
        if name.endswith("attn.qkv.weight"):
            for part, weight in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs = _huggingface_name(name).replace("{query,key,value}", part)
                state[prefix + theirs] = weight.contiguous()
        else:
            state[prefix + _huggingface_name(name)] = value
    config = _huggingface_config(model, encoder_only=encoder_only)
    if class_names and "id2label" in config:
        config["id2label"] = {str(i): name for i, name in enumerate(class_names)}
        config["label2id"] = {name: i for i, name in enumerate(class_names)}
    return state, config


def from_huggingface(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source: str = "transformers state",
) -> Network:
    """The network of a transformers folder: its tensors and its `config.json`.

    A BeitModel gives a network without a head (`vocab_size` or `num_classes` 0), depending on
    whether it pools. ValueError for what our network does not compute (another activation).
    """
    _check_huggingface_config(config, source)
    ours = _from_huggingface_names(state, source)
    image_size = config.get("image_size", 224)
    inferred = infer_config(
        ours,
        image_size=image_size if isinstance(image_size, int) else tuple(image_size),
        num_heads=config["num_attention_heads"],
        source=source,
    )
    inferred |= {"norm_eps": config.get("layer_norm_eps", 1e-12)}
    inferred |= {"drop_path": config.get("drop_path_rate", 0.1)}
    if inferred["layer_scale_init"] is not None:
        inferred |= {"layer_scale_init": config.get("layer_scale_init_value", 0.1)}
    return _load(_build(inferred), ours, source, _huggingface_name)


def to_timm(model: Network) -> tuple[State, dict[str, Any]]:
    """Tensors and constructor arguments of `timm.models.beit.Beit`.

    A shared bias table goes to every block, as in timm's own registered models. A `BeitMIM`
    becomes the encoder with its final norm (`global_pool=""`): timm has neither a mask token nor
    an MIM head. A network without absolute positions fits `beit_base_patch16_224` and its kin.
    """
    state = per_block_tables(model)
    if isinstance(model, BeitMIM):
        state = {n: v for n, v in state.items() if not n.startswith(("mask_token", "lm_head."))}
    arguments = {
        "img_size": list(model.image_size),
        "patch_size": model.patch_size,
        "embed_dim": model.dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "init_values": model.layer_scale_init,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": model.relative_positions != "none",
        "num_classes": 0 if isinstance(model, BeitMIM) else model.num_classes,
        "global_pool": "" if isinstance(model, BeitMIM) else _TIMM_POOL[model.pooling],
    }
    return state, arguments


def from_timm(
    state: Mapping[str, Tensor],
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    source: str = "timm state",
) -> Network:
    """The network of a timm `Beit`: with `fc_norm` a classifier, with `norm` an encoder.

    The latter is a `BeitMIM` with neither head nor (timm has none) a useful mask token.
    `image_size` and `num_heads` serve what tensors do not tell, as in `from_unilm`.
    """
    ours = {n: v for n, v in state.items() if not n.endswith("relative_position_index")}
    if isinstance(image_size, int) and square_side(ours):
        image_size = None  # the tensors tell their own
    config = infer_config(ours, image_size=image_size, num_heads=num_heads, source=source)
    return _load(_build(config), ours, source)


def official_tensors(state: Mapping[str, Any]) -> State:
    """The tensors of an official file, whatever they are wrapped in: `model`, `module`, or the
    `module.` that a data-parallel wrapper puts before each name."""
    for key in ("model", "module"):
        if isinstance(state.get(key), Mapping):
            return official_tensors(state[key])
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _build(config: dict[str, Any]) -> Network:
    if "early_layer" in config:
        return BeitV2MIM(**config)
    return BeitMIM(**config) if "vocab_size" in config else BeitClassifier(**config)


def _load(
    model: Network, state: State, source: str, spelling: Callable[[str], str] = str
) -> Network:
    expected = model.state_dict()
    if isinstance(model, BeitMIM) and not model.vocab_size and "mask_token" not in state:
        state = {**state, "mask_token": torch.zeros_like(expected["mask_token"])}
    check_state(state, expected, source=source, spelling=spelling)
    model.load_state_dict(state, strict=True)
    return model


def _huggingface_name(name: str) -> str:
    """Our name as transformers writes it; the split projection's has three alternatives."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block is None:
        return swap(name, _ENCODER_NAMES)
    rest = name[block.end() :]
    if rest == "attn.qkv.weight":
        rest = "attention.attention.{query,key,value}.weight"
    elif rest in ("attn.q_bias", "attn.v_bias"):
        rest = f"attention.attention.{'query' if rest == 'attn.q_bias' else 'value'}.bias"
    else:
        rest = swap(rest, BLOCK_NAMES)
    return f"encoder.layer.{block[1]}.{rest}"


def swap(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`name` with the first prefix found replaced; one without any stays, for the check to name."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _from_huggingface_names(state: Mapping[str, Tensor], source: str) -> State:
    ours: State = {}
    parts: dict[str, State] = {}
    reversed_names = [(theirs, own) for own, theirs in BLOCK_NAMES]
    for given, value in state.items():
        name = given.removeprefix("beit.")
        for pattern, replacement in _TRANSFORMERS_5:
            name = re.sub(pattern, replacement, name)
        block = re.match(r"encoder\.layer\.(\d+)\.", name)
        if name.endswith("relative_position_index"):
            continue
        if block is None:
            ours[swap(name, [(theirs, own) for own, theirs in _ENCODER_NAMES])] = value
            continue
        rest = name[block.end() :]
        split = re.fullmatch(r"attention\.attention\.(query|key|value)\.weight", rest)
        if split:
            parts.setdefault(block[1], {})[split[1]] = value
            continue
        bias = re.fullmatch(r"attention\.attention\.(query|value)\.bias", rest)
        known = f"attn.{bias[1][0]}_bias" if bias else swap(rest, reversed_names)
        ours[f"blocks.{block[1]}.{known}" if known != rest else name] = value
    for block_number, weights in parts.items():
        stem = f"encoder.layer.{block_number}.attention.attention."
        absent = [f"{stem}{p}.weight" for p in ("query", "key", "value") if p not in weights]
        if absent:
            raise ValueError(f"{source} does not fit the network; missing: {', '.join(absent)}")
        joined = torch.cat([weights["query"], weights["key"], weights["value"]])
        ours[f"blocks.{block_number}.attn.qkv.weight"] = joined
    return ours


def _huggingface_config(model: Network, *, encoder_only: bool) -> dict[str, Any]:
    pretraining = isinstance(model, BeitMIM)
    head = "BeitForMaskedImageModeling" if pretraining else "BeitForImageClassification"
    hidden = int(model.dim * model.mlp_ratio)
    pools_cls = isinstance(model, BeitClassifier) and model.pooling == "cls"
    config: dict[str, Any] = {
        "architectures": ["BeitModel" if encoder_only else head],
        "model_type": "beit",
        "dtype": "float32",
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": model.norm_eps,
        "image_size": model.image_size[0],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "use_mask_token": pretraining,
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "use_relative_position_bias": model.relative_positions == "per_block",
        "use_shared_relative_position_bias": model.relative_positions == "shared",
        "layer_scale_init_value": model.layer_scale_init or 0.0,
        "drop_path_rate": model.drop_path,
        # BeitModel norms its last state only where it does not pool by the mean.
        "use_mean_pooling": not (encoder_only and pretraining) and not pools_cls,
    }
    if isinstance(model, BeitMIM):
        config["vocab_size"] = model.vocab_size or 8192
    elif not encoder_only:
        names = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
        config |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    return config


def _check_huggingface_config(config: Mapping[str, Any], source: str) -> None:
    for name, supported in (("model_type", "beit"), ("hidden_act", "gelu"), ("num_channels", 3)):
        if config.get(name, supported) != supported:
            raise ValueError(f"{source}: {name} {config[name]!r} is not {supported!r}")
    if "num_attention_heads" not in config:
        raise ValueError(f"{source}: config.json has no num_attention_heads")
