"""Which parameters decay, and how their learning rates are scaled by depth."""

from typing import Any

from torch import nn

_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile put in front of it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups as microsoft/unilm makes them (`beit/optim_factory.py`).

    No decay for 1-d parameters, names ending in `.bias`, and those the model lists in
    `no_weight_decay` (`pos_embed` and `cls_token`); so `mask_token` and the relative position
    bias tables do decay. Frozen parameters are left out.

    Each group has `params`, `names`, `weight_decay` and `lr_scale`, by which the schedule's value
    is to be multiplied: 1 in pretraining; with `layer_decay` (fine-tuning) `layer_decay` to the
    power of the distance from the head, tokens and patch embedding being layer 0, block k layer
    k + 1. Empty groups are left out.
    """
    spared = set(getattr(_unwrap(model), "no_weight_decay", ()))
    depth = len(getattr(_unwrap(model), "blocks", ()))
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for wrapped_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = plain_name(wrapped_name)
        decays = not (parameter.ndim <= 1 or name.endswith(".bias") or name in spared)
        layer = depth + 1 if layer_decay is None else _layer(name, depth)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def _unwrap(model: nn.Module) -> nn.Module:
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrap(inner)
    return model


def _layer(name: str, depth: int) -> int:
    first = name.partition(".")[0]
    if first in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if first == "blocks":
        return int(name.split(".")[1]) + 1
    return depth + 1
