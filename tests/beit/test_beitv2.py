"""Patch aggregation beside an own writing of the official network (`beit2/modeling_pretrain.py`).

The other network is plain functions of a `state_dict` with the official names: explicit softmax,
all blocks and heads evaluated everywhere, masked patches picked at the end.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from beit.mim import BeitV2MIM, model_config
from beit.optim import parameter_groups

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 32,
    "depth": 4,
    "num_heads": 4,
    "vocab_size": 50,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
    "early_layer": 2,
}
CONFIGS = {
    "released": SMALL,
    "plain": {
        **SMALL,
        "absolute_positions": True,
        "relative_positions": "none",
        "layer_scale_init": None,
        "early_layer": 3,
    },
}


def official_bias(table, side):
    """Bias (heads, 1+N, 1+N) of the official index: offsets row by row, three rows for cls."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    index = torch.zeros(side * side + 1, side * side + 1, dtype=torch.int64)
    offsets = (y[:, None] - y[None] + side - 1) * (2 * side - 1) + x[:, None] - x[None] + side - 1
    index[1:, 1:] = offsets
    index[0, :], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
    return table[index].permute(2, 0, 1)


def official_block(state, name, x, heads, bias):
    def linear(of, y):
        return y @ state[f"{name}.{of}.weight"].T + state[f"{name}.{of}.bias"]

    def norm(of, y):
        return F.layer_norm(
            y, y.shape[-1:], state[f"{name}.{of}.weight"], state[f"{name}.{of}.bias"], 1e-6
        )

    B, T, D = x.shape
    qkv = norm("norm1", x) @ state[f"{name}.attn.qkv.weight"].T
    q, k, v = qkv.split(D, dim=-1)
    q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
    q, k, v = (t.view(B, T, heads, D // heads).transpose(1, 2) for t in (q, k, v))
    attention = (q * (D // heads) ** -0.5) @ k.transpose(-2, -1)
    attention = (attention if bias is None else attention + bias).softmax(dim=-1)
    y = linear("attn.proj", (attention @ v).transpose(1, 2).reshape(B, T, D))
    x = x + state.get(f"{name}.gamma_1", 1) * y
    hidden = linear("mlp.fc1", norm("norm2", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + state.get(f"{name}.gamma_2", 1) * linear("mlp.fc2", hidden)


def official_logits(state, pixels, mask, config):
    """Logits of the masked patches from the last block and from the aggregation head."""
    patch, heads = config["patch_size"], config["num_heads"]
    kernel, offset = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.unfold(pixels, patch, stride=patch).transpose(1, 2) @ kernel.flatten(1).T + offset
    x = torch.where(mask[..., None], state["mask_token"], x)
    x = torch.cat((state["cls_token"].expand(len(x), 1, -1), x), dim=1)
    bias = None
    if "pos_embed" in state:
        x = x + state["pos_embed"]
    else:
        table = state["rel_pos_bias.relative_position_bias_table"]
        bias = official_bias(table, config["image_size"] // patch)
    for i in range(config["depth"]):
        x = official_block(state, f"blocks.{i}", x, heads, bias)
        if i + 1 == config["early_layer"]:
            early = x[:, 1:]
    y = torch.cat((x[:, [0]], early), dim=1)
    for i in range(2):
        y = official_block(state, f"cls_pt_layers.{i}", y, heads, bias)

    def head(states):
        states = F.layer_norm(
            states, states.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6
        )
        return (states @ state["lm_head.weight"].T + state["lm_head.bias"])[:, 1:][mask]

    return head(x), head(y)


@pytest.fixture(params=CONFIGS, name="pair")
def _pair(request):
    """A network with random weights, the same as a state of leaves, and its configuration."""
    config, generator = CONFIGS[request.param], torch.Generator().manual_seed(0)
    model = BeitV2MIM(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    return model, state, config


def batch(seed=1, images=3):
    """Pixels, an exact mask (as v2's) and targets."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    mask = torch.rand(images, 16, generator=generator).argsort(dim=1).argsort(dim=1) < 7
    return pixels, mask, torch.randint(50, (7 * images,), generator=generator)


def both_losses(logits, targets):
    return F.cross_entropy(logits[0], targets) + F.cross_entropy(logits[1], targets)


def test_logits_and_gradients_are_those_of_the_official_network(pair):
    model, state, config = pair
    pixels, mask, targets = batch()
    ours, theirs = model(pixels, mask), official_logits(state, pixels, mask, config)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=2e-6, rtol=1e-5)
    everything = model(pixels, mask, all_tokens=True)
    torch.testing.assert_close(everything[:, mask], ours, atol=2e-6, rtol=1e-5)
    both_losses(ours, targets).backward()
    both_losses(theirs, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=2e-6, rtol=1e-4)


def test_twenty_steps_of_adamw_go_the_same_way(pair):
    # In float64: AdamW divides by the root of the second moment, so that in float32 rounding
    # decides which way a parameter goes whose gradient is nearly zero.
    model, state, config = pair
    model.double()
    state = {name: value.detach().double().requires_grad_() for name, value in state.items()}
    spared = {n for n, v in state.items() if v.ndim == 1 or n in ("cls_token", "pos_embed")}
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8}
    theirs = torch.optim.AdamW(
        [
            {"params": [v for n, v in state.items() if n not in spared], "weight_decay": 0.05},
            {"params": [state[n] for n in spared], "weight_decay": 0.0},
        ],
        **options,
    )
    ours = torch.optim.AdamW(parameter_groups(model, 0.05), **options)
    history = []
    for step in range(20):
        pixels, mask, targets = batch(seed=step % 2)
        pixels = pixels.double()
        losses = (
            both_losses(model(pixels, mask), targets),
            both_losses(official_logits(state, pixels, mask, config), targets),
        )
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append([loss.item() for loss in losses])
        assert history[-1][0] == pytest.approx(history[-1][1], abs=1e-9)
    assert history[-1][0] < history[0][0] - 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, state[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("size", "early_layer", "count"), [("base", 9, 106_143_056), ("large", 21, 336_728_512)]
)
def test_parameters_are_as_many_as_in_the_official_network(size, early_layer, count):
    with torch.device("meta"):
        model = BeitV2MIM(**model_config(size), early_layer=early_layer)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_head_blocks_start_as_torch_does_and_count_their_depth_on():
    model = BeitV2MIM(**{**SMALL, "dim": 256})
    first, second = model.cls_pt_layers
    bound = 1 / 16
    for block, layer in ((first, 3), (second, 4)):
        assert block.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert block.mlp.fc1.bias.abs().max().item() == pytest.approx(bound, rel=2e-2)
        damped = block.attn.proj.weight.abs().max().item()
        assert damped == pytest.approx(bound / math.sqrt(2 * layer), rel=1e-3)
        assert not block.attn.q_bias.any()
        assert torch.equal(block.gamma_1, torch.full((256,), 0.1))
    again = BeitV2MIM(**{**SMALL, "dim": 256})
    for network in (model, again):
        network.init_weights(torch.Generator().manual_seed(5))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_drop_path_rates_go_on_at_the_early_layer():
    deep = BeitV2MIM(**{**SMALL, "depth": 5, "drop_path": 0.4})
    assert [block.drop_path for block in deep.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.drop_path for block in deep.cls_pt_layers] == pytest.approx([0.2, 0.3])
    late = BeitV2MIM(**{**SMALL, "early_layer": 3, "drop_path": 0.4})
    assert [block.drop_path for block in late.cls_pt_layers] == pytest.approx([0.3, 0.4])


def test_noise_of_the_head_blocks_comes_after_that_of_the_encoder():
    model = BeitV2MIM(**{**SMALL, "drop_path": 0.9})
    pixels, mask, _ = batch()
    kept, dropped = torch.ones(3, 6, 2), torch.ones(3, 6, 2)
    dropped[:, 4:] = 0  # no branch of the head survives
    (main, whole), (same, bare) = (model(pixels, mask, noise=n) for n in (kept, dropped))
    assert torch.equal(main, same)
    assert not torch.equal(whole, bare)
    with pytest.raises(ValueError, match="noise is"):
        model(pixels, mask, noise=torch.ones(3, 4, 2))


def test_recomputing_blocks_changes_no_gradient():
    model = BeitV2MIM(**SMALL)
    pixels, mask, targets = batch()
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        both_losses(model(pixels, mask), targets).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("change", [{"early_layer": 0}, {"early_layer": 4}, {"head_layers": 0}])
def test_layers_that_are_not_there_are_refused(change):
    with pytest.raises(ValueError, match="early_layer"):
        BeitV2MIM(**{**SMALL, **change})


def test_its_configuration_rebuilds_it():
    model = BeitV2MIM(**{**SMALL, "head_layers": 1})
    again = BeitV2MIM(**model.config())
    again.load_state_dict(model.state_dict())
    pixels, mask, _ = batch()
    assert torch.equal(again(pixels, mask), model(pixels, mask))
