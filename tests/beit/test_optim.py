"""Which parameters decay, by name, as in the official optimiser factory."""

import re

import pytest
import torch

from beit.mim import BeitMIM
from beit.optim import parameter_groups, plain_name

CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 11,
    "absolute_positions": True,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}
DECAYED = {
    "mask_token",
    "patch_embed.proj.weight",
    "rel_pos_bias.relative_position_bias_table",
    "lm_head.weight",
} | {
    f"blocks.{i}.{leaf}.weight"
    for i in range(2)
    for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}


def test_groups_hold_every_parameter_once_and_decay_the_official_ones():
    model = BeitMIM(**CONFIG)
    groups = parameter_groups(model, 0.05)
    named = dict(model.named_parameters())
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    assert {group["lr_scale"] for group in groups} == {1.0}
    by_decay = {group["weight_decay"]: set(group["names"]) for group in groups}
    assert by_decay[0.05] == DECAYED
    assert by_decay[0.0] == set(named) - DECAYED
    for group in groups:
        assert [named[name] for name in group["names"]] == list(group["params"]) or all(
            named[name] is parameter
            for name, parameter in zip(group["names"], group["params"], strict=True)
        )


def test_groups_feed_adamw_and_survive_its_state():
    model = BeitMIM(**CONFIG)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    state = optimiser.state_dict()
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.05, 0.0]
    torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3).load_state_dict(state)


def test_wrapped_models_have_the_same_groups():
    model = BeitMIM(**CONFIG)
    wrapped = torch.nn.Module()
    wrapped.module = model
    plain, inside = parameter_groups(model, 0.1), parameter_groups(wrapped, 0.1)
    compiled = parameter_groups(torch.compile(model), 0.1)
    assert [g["names"] for g in plain] == [g["names"] for g in inside]
    assert [g["names"] for g in plain] == [g["names"] for g in compiled]
    assert plain_name("module._orig_mod.blocks.0.norm1.bias") == "blocks.0.norm1.bias"


def test_frozen_parameters_are_left_out():
    model = BeitMIM(**CONFIG)
    model.lm_head.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in group["names"]]
    assert not any(name.startswith("lm_head") for name in names)


def test_layer_decay_ids_are_the_official_ones():
    groups = parameter_groups(BeitMIM(**CONFIG), 0.05, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for name, scale in scales.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed")):
            layer = 0
        elif block:
            layer = int(block[1]) + 1
        else:
            layer = 3
        assert scale == pytest.approx(0.5 ** (3 - layer)), name
