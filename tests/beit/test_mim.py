"""The pretraining network: what it predicts, its loss, its state and its gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from beit.mim import BeitMIM, masked_rows, model_config

SHARED = {
    "image_size": (16, 40),
    "patch_size": 8,
    "dim": 32,
    "depth": 3,
    "num_heads": 4,
    "vocab_size": 50,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}
CONFIGS = {
    "shared": SHARED,
    "plain": {
        **SHARED,
        "absolute_positions": True,
        "relative_positions": "none",
        "layer_scale_init": None,
    },
    "per_block": {**SHARED, "relative_positions": "per_block"},
    "both": {**SHARED, "absolute_positions": True},
}


@pytest.fixture(params=CONFIGS, name="model")
def _model(request):
    model = BeitMIM(**CONFIGS[request.param])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ragged_batch(model):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, *model.image_size, generator=generator)
    mask = torch.zeros(4, model.num_patches, dtype=torch.bool)
    mask[0, [1, 4, 9]] = True
    mask[1, [0]] = True  # image 2 has none
    mask[3] = True
    return pixels, mask


def test_logits_of_ragged_masks_are_those_of_all_tokens_in_row_major_order(model):
    pixels, mask = ragged_batch(model)
    masked = model(pixels, mask)
    everything = model(pixels, mask, all_tokens=True)
    assert everything.shape == (4, 10, 50)
    assert masked.shape == (14, 50)
    torch.testing.assert_close(masked, everything[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(pixels, mask, num_masked=14), masked, atol=0, rtol=0)


def test_masked_pixels_do_not_matter_and_visible_ones_do(model):
    pixels, mask = ragged_batch(model)
    before = model(pixels, mask)
    noise = torch.randn_like(pixels)
    per_pixel = mask.view(4, 1, 2, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    after = model(torch.where(per_pixel, noise, pixels), mask)
    assert torch.equal(before, after)
    assert not torch.allclose(before, model(torch.where(per_pixel, pixels, noise), mask))


def test_every_parameter_gets_a_gradient(model):
    pixels, mask = ragged_batch(model)
    targets = torch.randint(50, (14,), generator=torch.Generator().manual_seed(2))
    F.cross_entropy(model(pixels, mask), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_of_the_masked_path_equal_those_of_the_full_one(model):
    pixels, mask = ragged_batch(model)
    targets = torch.randint(50, (14,), generator=torch.Generator().manual_seed(2))
    gradients = []
    for logits in (model(pixels, mask), model(pixels, mask, all_tokens=True)[mask]):
        model.zero_grad()
        F.cross_entropy(logits, targets).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_agree_with_finite_differences():
    config = {**CONFIGS["both"], "dim": 8, "depth": 2, "num_heads": 2, "vocab_size": 5}
    model = BeitMIM(**config).double()
    pixels, mask = ragged_batch(model)
    pixels = pixels.double()
    targets = torch.randint(5, (14,), generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(pixels, mask), targets)

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-5)
            up = loss()
            parameter.sub_(direction, alpha=2e-5)
            down = loss()
            parameter.add_(direction, alpha=1e-5)
        expected = (parameter.grad * direction).sum()
        assert (up - down).item() / 2e-5 == pytest.approx(expected.item(), rel=1e-4, abs=1e-7), name


def test_one_masked_batch_can_be_learnt():
    model = BeitMIM(**CONFIGS["plain"])
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, *model.image_size, generator=generator)
    mask = torch.rand(4, model.num_patches, generator=generator) < 0.4
    targets = torch.randint(50, (int(mask.sum()),), generator=generator)
    assert F.cross_entropy(model(pixels, mask), targets).item() == pytest.approx(
        math.log(50), abs=0.05
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(pixels, mask), targets)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2
    assert torch.equal(model(pixels, mask).argmax(dim=1), targets)


def test_a_batch_with_nothing_masked_has_zero_loss_and_zero_gradients():
    model = BeitMIM(**SHARED)
    pixels, mask = ragged_batch(model)
    logits = model(pixels, torch.zeros_like(mask))
    assert logits.shape == (0, 50)
    targets = torch.empty(0, dtype=torch.int64)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_features_are_those_of_the_unmasked_image(model):
    pixels, mask = ragged_batch(model)
    last = model.features(pixels)
    assert last.shape == (4, 11, 32)
    nothing = torch.zeros_like(mask)
    logits = model(pixels, nothing, all_tokens=True)
    torch.testing.assert_close(model.lm_head(last[:, 1:]), logits, atol=1e-5, rtol=0)
    third = model.features(pixels, layer=3)
    torch.testing.assert_close(model.norm(third), last, atol=1e-5, rtol=0)
    assert not torch.allclose(model.features(pixels, layer=1), third)
    with pytest.raises(ValueError, match=r"outside 1\.\.3"):
        model.features(pixels, layer=4)


def test_config_rebuilds_the_model(model):
    again = BeitMIM(**model.config())
    again.load_state_dict(model.state_dict(), strict=True)
    pixels, mask = ragged_batch(model)
    assert torch.equal(again(pixels, mask), model(pixels, mask))


def test_state_has_the_official_names():
    names = set(BeitMIM(**SHARED).state_dict())
    norms = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    attention = ["attn.q_bias", "attn.v_bias", "attn.qkv.weight"]
    attention += ["attn.proj.weight", "attn.proj.bias"]
    mlp = ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    leaves = ["gamma_1", "gamma_2", *norms, *attention, *mlp]
    block = {f"blocks.{i}.{leaf}" for i in range(3) for leaf in leaves}
    top = {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    top |= {"norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"}
    top |= {"rel_pos_bias.relative_position_bias_table"}
    assert names == block | top


def test_official_index_buffer_is_accepted_if_right_and_refused_if_not():
    model = BeitMIM(**SHARED)
    state = dict(model.state_dict())
    name = "rel_pos_bias.relative_position_index"
    state[name] = model.rel_pos_bias.relative_position_index.clone()
    model.load_state_dict(state, strict=True)
    assert name in state, "the caller's dictionary is left alone"
    state[name] = state[name].T.contiguous()
    with pytest.raises(ValueError, match="another patch grid"):
        model.load_state_dict(state, strict=True)


def test_masked_rows_skip_the_cls_tokens():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_rows(mask).tolist() == [1, 3, 6]
    assert masked_rows(mask, 3).tolist() == [1, 3, 6]
    with pytest.raises(ValueError, match="num_masked is 2, but the mask has 3"):
        masked_rows(mask, 2)


def test_wrong_inputs_are_refused_by_name():
    model = BeitMIM(**SHARED)
    pixels, mask = ragged_batch(model)
    with pytest.raises(ValueError, match=r"built for \(16, 40\)"):
        model(pixels.transpose(2, 3), mask)
    with pytest.raises(ValueError, match=r"mask is \(4, 9\), expected \(4, 10\)"):
        model(pixels, mask[:, 1:])
    with pytest.raises(ValueError, match="size 'huge' is unknown; use one of tiny"):
        model_config("huge")
