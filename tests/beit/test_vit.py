"""The encoder: positions, initialisation, drop-path, checkpointing, compilation."""

import hashlib
import math

import pytest
import torch

from beit.initialisation import truncated_normal_
from beit.mim import BeitMIM, model_config
from beit.position_bias import bias_table_rows, relative_position_index
from beit.vit import Attention, BeitEncoder, BlockNorm, drop_path_noise

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 32,
    "depth": 3,
    "num_heads": 4,
    "vocab_size": 50,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}
PLAIN = {
    **SMALL,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
}


def randomised(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Every parameter random, so that no term of the computation is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def batch(model: BeitMIM, size: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, *model.image_size, generator=generator)
    mask = torch.rand(size, model.num_patches, generator=generator) < 0.4
    return pixels, mask


@pytest.mark.parametrize(
    ("size", "architecture", "expected"),
    [
        ("base", "shared_bias", 91_965_776),
        ("base", "plain", 92_089_856),
        ("large", "shared_bias", 311_534_016),
        ("large", "plain", 311_674_880),
    ],
)
def test_parameter_counts_are_the_published_ones(size, architecture, expected):
    with torch.device("meta"):
        model = BeitMIM(**model_config(size, architecture=architecture))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_index_table_for_a_non_square_grid_by_brute_force():
    H, W = 3, 5
    index = relative_position_index((H, W))
    n = bias_table_rows((H, W))
    assert n == (2 * H - 1) * (2 * W - 1) + 3
    for q in range(H * W):
        for k in range(H * W):
            dy, dx = q // W - k // W, q % W - k % W
            assert index[q + 1, k + 1] == (dy + H - 1) * (2 * W - 1) + dx + W - 1
    assert index[0, 1:].unique().tolist() == [n - 3]
    assert index[1:, 0].unique().tolist() == [n - 2]
    assert index[0, 0] == n - 1
    assert index.unique().numel() == n


def test_index_of_the_standard_grid():
    index = relative_position_index((14, 14))
    assert index.shape == (197, 197)
    assert bias_table_rows((14, 14)) == 732
    assert index[1:, 1:].diagonal().unique().tolist() == [364]


def test_attention_equals_the_formula_written_out():
    torch.manual_seed(0)
    attention = randomised(Attention(24, 3, (2, 2)))
    x, bias = torch.randn(2, 5, 24), torch.randn(1, 3, 5, 5)
    q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
    q, v = q + attention.q_bias, v + attention.v_bias
    q, k, v = (t.view(2, 5, 3, 8).transpose(1, 2) for t in (q, k, v))
    own = attention.relative_position_bias_table[relative_position_index((2, 2))].permute(2, 0, 1)
    weights = ((q * 8**-0.5) @ k.transpose(-1, -2) + own + bias).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(attention(x, bias, None), expected, atol=1e-5, rtol=0)


def test_initialisation_is_cut_at_one_sigma_and_rescaled_by_depth():
    model = BeitMIM(**{**SMALL, "dim": 256, "depth": 4})
    model.init_weights(torch.Generator().manual_seed(0))
    realised = 0.02 * 0.53956
    for weight in (model.patch_embed.proj.weight, model.lm_head.weight):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(realised, rel=0.02)
    for token in (model.cls_token, model.mask_token):
        assert 0 < token.abs().max() <= 0.02
    for i, block in enumerate(model.blocks, start=1):
        for rescaled in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert rescaled.abs().max() <= 0.02 / math.sqrt(2 * i) + 1e-9
            assert rescaled.std().item() == pytest.approx(realised / math.sqrt(2 * i), rel=0.02)
        for plain in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert plain.std().item() == pytest.approx(realised, rel=0.02)
        assert block.gamma_1.unique().tolist() == block.gamma_2.unique().tolist()
        assert block.gamma_1[0].item() == pytest.approx(0.1)
        for zero in (block.attn.q_bias, block.attn.v_bias, block.mlp.fc1.bias, block.norm1.bias):
            assert zero.abs().max() == 0
    assert model.rel_pos_bias.relative_position_bias_table.abs().max() == 0


def test_truncated_normal_follows_the_cut_normal_distribution():
    draws = truncated_normal_(torch.empty(200_000), torch.Generator().manual_seed(3)) / 0.02
    for level in (0.25, 0.5, 0.75):
        expected = math.erf(level / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
        assert (draws.abs() < level).float().mean().item() == pytest.approx(expected, abs=0.005)
    assert draws.mean().abs() < 0.005


def test_initialisation_depends_on_the_generator_alone():
    first, second = BeitMIM(**PLAIN), BeitMIM(**PLAIN)
    torch.manual_seed(5)
    first.init_weights(torch.Generator().manual_seed(9))
    torch.manual_seed(6)
    second.init_weights(torch.Generator().manual_seed(9))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("config", [SMALL, PLAIN])
def test_last_block_on_chosen_rows_is_exact(config):
    model = randomised(BeitMIM(**config))
    pixels, mask = batch(model)
    x = model.embed(pixels, mask, model.mask_token)
    rows = torch.tensor([0, 3, 17, 20, 50])
    chosen = model.run_blocks(x, last_rows=rows)
    torch.testing.assert_close(chosen, model.run_blocks(x).flatten(0, 1)[rows], atol=1e-5, rtol=0)


def test_drop_path_scales_or_drops_whole_samples():
    model = randomised(BeitMIM(**{**SMALL, "depth": 1}))
    block = model.blocks[0]
    block.drop_path = 0.25
    x = torch.randn(2, 17, 32)
    none_kept = block(x, noise=torch.zeros(2, 2))
    assert torch.equal(none_kept, x)
    kept = block(x, noise=torch.full((2, 2), 0.9))
    branch = block.gamma_1 * block.attn(block.norm1(x), None, None) / 0.75
    middle = x + branch
    expected = middle + block.gamma_2 * block.mlp(block.norm2(middle)) / 0.75
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)


def test_drop_path_rates_rise_linearly_and_act_in_training_only():
    model = randomised(BeitMIM(**{**SMALL, "drop_path": 0.2}))
    assert [round(block.drop_path, 6) for block in model.blocks] == [0.0, 0.1, 0.2]
    pixels, mask = batch(model)
    noise = torch.zeros(3, 3, 2)  # drops every branch that can be dropped
    dropped = model(pixels, mask, noise=noise)
    model.eval()
    assert not torch.allclose(dropped, model(pixels, mask, noise=noise))
    assert torch.equal(model(pixels, mask), model(pixels, mask, noise=noise))


def test_drop_path_keeps_the_expectation():
    model = BeitMIM(**{**SMALL, "drop_path": 0.3})
    noise = drop_path_noise(seed=1, step=2, num_samples=20_000, num_branches=3)
    survival = 1 - model.blocks[2].drop_path
    keep = torch.floor(noise[:, 2] + survival) / survival
    assert keep.mean().item() == pytest.approx(1, abs=0.01)


def test_drop_path_noise_is_a_function_of_seed_and_step_and_splits_over_workers():
    whole = drop_path_noise(seed=4, step=7, num_samples=12, num_branches=3)
    assert torch.equal(whole, drop_path_noise(seed=4, step=7, num_samples=12, num_branches=3))
    assert not torch.equal(whole, drop_path_noise(seed=4, step=8, num_samples=12, num_branches=3))
    assert not torch.equal(whole, drop_path_noise(seed=5, step=7, num_samples=12, num_branches=3))
    golden = drop_path_noise(seed=3, step=7, num_samples=12, num_branches=3).numpy().tobytes()
    assert hashlib.blake2b(golden, digest_size=8).hexdigest() == "06392e2654d3c954"
    model = randomised(BeitMIM(**{**SMALL, "drop_path": 0.5}))
    pixels, mask = batch(model, size=12)
    together = model(pixels, mask, all_tokens=True, noise=whole)
    parts = [
        model(pixels[i : i + 3], mask[i : i + 3], all_tokens=True, noise=whole[i : i + 3])
        for i in range(0, 12, 3)
    ]
    torch.testing.assert_close(together, torch.cat(parts), atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [SMALL, PLAIN, {**SMALL, "relative_positions": "per_block"}])
def test_activation_checkpointing_changes_neither_outputs_nor_gradients(config):
    model = randomised(BeitMIM(**{**config, "drop_path": 0.3}))
    pixels, mask = batch(model)
    noise = drop_path_noise(seed=0, step=0, num_samples=3, num_branches=3)
    results = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        model.zero_grad()
        logits = model(pixels, mask, noise=noise)
        logits.square().mean().backward()
        results.append((logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], msg=name)


def check_compiled(backend: str, counts_known: tuple[bool, ...]) -> None:
    model = randomised(BeitMIM(**{**SMALL, "depth": 2, "drop_path": 0.2}))
    compiled = torch.compile(model, backend=backend)
    for seed in (1, 2):  # two ragged counts of masked patches
        pixels, mask = batch(model, seed=seed)
        noise = drop_path_noise(seed=0, step=seed, num_samples=3, num_branches=2)
        for count in [int(mask.sum()) if known else None for known in counts_known]:
            results = []
            for module in (model, compiled):
                model.zero_grad()
                logits = module(pixels, mask, noise=noise, num_masked=count)
                logits.square().mean().backward()
                results.append((logits.detach(), model.blocks[0].attn.qkv.weight.grad.clone()))
            torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def test_captured_graphs_give_the_same_logits_and_gradients():
    check_compiled("aot_eager", (True, False))


@pytest.mark.long
def test_compiled_kernels_give_the_same_logits_and_gradients():
    check_compiled("inductor", (True,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "not divisible by patch_size 8"),
        ({"image_size": (32, 36)}, "not divisible"),
        ({"image_size": 4}, "holds no patch"),
        ({"num_heads": 5}, "not divisible by num_heads 5"),
        ({"relative_positions": "both"}, "use none, shared or per_block"),
        ({"drop_path": 1.0}, "outside"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        BeitMIM(**{**SMALL, **change})


def test_layer_scale_of_zero_means_none():
    config = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    assert BeitEncoder(**{**config, "layer_scale_init": 0.0}).blocks[0].gamma_1 is None


def test_norms_of_blocks_compute_in_the_wider_type():
    """As torch's, also of bfloat16 under autocast; and in float32 with weights gathered in less."""
    x, generator = torch.randn(64, 32), torch.Generator().manual_seed(0)
    norm, wanted = BlockNorm(32), torch.nn.LayerNorm(32)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    wanted.load_state_dict(norm.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), wanted(x.bfloat16()))
    norm.bfloat16()
    wanted.bfloat16().float()
    assert torch.equal(norm(x), wanted(x))
