"""MAE beside transformers' ViTMAEForPreTraining: the same weights, mask and pixels."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from beit.mae import Mae, MaeNetwork, from_patches, sine_positions, to_patches
from beit.mim import BeitMIM
from beit.optim import parameter_groups

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 64,
    "depth": 3,
    "num_heads": 4,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def randomised(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def batch(images=3, num_masked=12):
    """Pixels, noise whose largest entries are masked, and that mask."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    noise = torch.rand(images, 16, generator=generator)
    return pixels, noise, noise.argsort(dim=1).argsort(dim=1) >= 16 - num_masked


def peer_of(network, *, normalise):
    """transformers' network with our weights, and biases of keys that we do not have."""
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=32,
            patch_size=8,
            hidden_size=network.dim,
            num_hidden_layers=network.depth,
            num_attention_heads=network.num_heads,
            intermediate_size=4 * network.dim,
            decoder_hidden_size=network.decoder_dim,
            decoder_num_hidden_layers=len(network.decoder_blocks),
            decoder_num_attention_heads=network.decoder_heads,
            decoder_intermediate_size=4 * network.decoder_dim,
            layer_norm_eps=1e-6,
            norm_pix_loss=normalise,
            attn_implementation="eager",
        )
    )
    ours, theirs = network.state_dict(), peer.state_dict()
    named = {name: peer_names(name) for name in ours}
    for name, targets in named.items():
        for target, part in zip(targets, ours[name].chunk(len(targets)), strict=True):
            assert theirs[target].shape == part.shape
            theirs[target].copy_(part)
    written = {target for targets in named.values() for target in targets}
    missing = theirs.keys() - written
    assert all(name.endswith("k_proj.bias") for name in missing)
    for name in sorted(missing):
        theirs[name].normal_(generator=torch.Generator().manual_seed(2))
    return peer


def peer_names(name):
    """What transformers calls one of our tensors; the fused projection has three names."""
    if name in ("mask_token", "decoder_pos_embed") or (
        name.startswith("decoder_") and "blocks" not in name
    ):
        return [f"decoder.{name}"]
    if "blocks." not in name:
        top = {
            "cls_token": "vit.embeddings.cls_token",
            "pos_embed": "vit.embeddings.position_embeddings",
        }
        name = name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
        return [top.get(name, name.replace("norm.", "vit.layernorm."))]
    name = name.replace("decoder_blocks.", "decoder.decoder_layers.")
    name = name if name.startswith("decoder") else f"vit.layers.{name.removeprefix('blocks.')}"
    if name.endswith("attn.qkv.weight"):
        prefix = name.removesuffix("attn.qkv.weight")
        return [f"{prefix}attention.{part}_proj.weight" for part in "qkv"]
    for ours, theirs in (
        ("attn.q_bias", "attention.q_proj.bias"),
        ("attn.v_bias", "attention.v_proj.bias"),
        ("attn.proj", "attention.o_proj"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
    ):
        name = name.replace(ours, theirs)
    return [name]


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients_are_those_of_transformers(normalise):
    network = randomised(MaeNetwork(**SMALL))
    objective, peer = Mae(network, normalise=normalise), peer_of(network, normalise=normalise)
    pixels, noise, mask = batch()
    sums, codes = objective(pixels, mask, None, num_masked=36, noise=None)
    expected = peer(pixels, noise=noise)
    assert codes is None
    assert torch.equal(expected.mask.bool(), mask)
    loss = sums[0] / 36
    assert loss.item() == pytest.approx(expected.loss.item(), abs=2e-6)
    painted = network(pixels, mask)
    torch.testing.assert_close(painted, expected.logits[mask], atol=2e-6, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        theirs = torch.cat([gradients[target] for target in peer_names(name)])
        torch.testing.assert_close(parameter.grad, theirs, atol=2e-6, rtol=1e-4)
    # What we leave out has no part in the loss.
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):
            assert gradient.abs().max() < 1e-7


def test_positions_are_sines_of_the_column_then_of_the_row():
    positions = sine_positions((2, 3), 8)[0]
    assert not positions[0].any()
    for row in range(2):
        for column in range(3):
            expected = [
                of(axis / 10_000 ** (i / 2))
                for axis in (column, row)
                for of in (math.sin, math.cos)
                for i in range(2)
            ]
            assert positions[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_positions((2, 2), 6)


def test_patches_hold_rows_columns_channels_and_go_back():
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = to_patches(pixels, 2)
    assert patches.shape == (2, 6, 12)
    # Image 1, patch in row 1 and column 2, pixel in row 0 and column 1 of it, channel 2.
    assert patches[1, 5, (0 * 2 + 1) * 3 + 2] == pixels[1, 2, 2, 5]
    assert torch.equal(from_patches(patches, (2, 3)), pixels)


def test_what_is_minimised_reaches_every_trained_parameter_and_positions_stay():
    network = MaeNetwork(**SMALL)
    pixels, _, mask = batch()
    Mae(network)(pixels, mask, None, num_masked=36, noise=None).sums[0].backward()
    for name, parameter in network.named_parameters():
        if name.endswith("pos_embed"):
            assert parameter.grad is None
        else:
            assert parameter.grad.any(), name
    groups = {
        name: group["weight_decay"]
        for group in parameter_groups(network, 0.05)
        for name in group["names"]
    }
    assert groups["cls_token"] == groups["mask_token"] == groups["decoder_pred.weight"] == 0.05
    assert groups["norm.weight"] == groups["decoder_pred.bias"] == 0
    assert "pos_embed" not in groups


def test_hidden_pixels_do_not_reach_the_encoder():
    network = randomised(MaeNetwork(**SMALL))
    pixels, _, mask = batch()
    hidden = from_patches(mask[..., None].expand(-1, -1, 192).float(), (4, 4)).bool()
    assert torch.equal(network(pixels, mask), network(pixels.masked_fill(hidden, 9.0), mask))


def test_nothing_masked_is_a_loss_and_gradients_of_zero():
    objective = Mae(MaeNetwork(**SMALL))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    sums, _ = objective(batch()[0][:1], mask, None, num_masked=0, noise=None)
    assert sums.tolist() == [0]
    sums[0].backward()
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_masks_of_different_counts_are_refused():
    pixels, _, mask = batch()
    mask[1, :] = True
    with pytest.raises(ValueError, match="12 to 16 patches are masked"):
        MaeNetwork(**SMALL)(pixels, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_positions": "shared"}, "relative_positions='none'"),
        ({"absolute_positions": False}, "absolute_positions=True"),
        ({"decoder_heads": 5}, "decoder_dim 32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MaeNetwork(**{**SMALL, **change})


def test_a_picture_keeps_what_is_visible_and_is_perfect_if_the_prediction_is():
    network = MaeNetwork(**SMALL)
    pixels, _, mask = batch()
    for normalise in (True, False):
        objective = Mae(network, normalise=normalise)
        wanted = to_patches(pixels, 8)[mask]
        if normalise:
            mean, variance = wanted.mean(1, keepdim=True), wanted.var(1, keepdim=True)
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
        network.forward = lambda *_, painted=wanted: painted
        torch.testing.assert_close(objective.predict(pixels, mask), pixels, atol=1e-5, rtol=0)
        network.forward = lambda *_, painted=wanted: painted + 1
        picture = to_patches(objective.predict(pixels, mask), 8)
        assert torch.equal(picture[~mask], to_patches(pixels, 8)[~mask])
        assert (picture != to_patches(pixels, 8))[mask].all()


def test_what_is_exported_is_the_encoder():
    objective = Mae(randomised(MaeNetwork(**SMALL)))
    exported = objective.export(objective.network.state_dict())
    assert type(exported) is BeitMIM
    pixels = batch()[0]
    tokens = objective.network.features(pixels, layer=2)
    assert torch.equal(exported.features(pixels, layer=2), tokens)
    assert exported.features(pixels).shape == (3, 17, 64)
    again = MaeNetwork(**objective.network.config())
    again.load_state_dict(objective.network.state_dict())


def test_flops_match_what_is_executed():
    objective = Mae(MaeNetwork(**SMALL))
    pixels, _, mask = batch(images=2)
    with FlopCounterMode(display=False) as counter:
        objective(pixels, mask, None, num_masked=24, noise=None).sums[0].backward()
    # The counter does not know the fused attention kernel of the CPU: 4 * T^2 * dim a block.
    attention = 3 * (3 * 4 * 5**2 * 64 + 2 * 4 * 17**2 * 32)
    assert counter.get_total_flops() / 2 == objective.flops_per_image(12) - attention


def test_base_is_as_large_as_the_official_network():
    with torch.device("meta"):
        network = MaeNetwork(
            image_size=224,
            patch_size=16,
            dim=768,
            depth=12,
            num_heads=12,
            absolute_positions=True,
            relative_positions="none",
            layer_scale_init=None,
        )
    # 111,907,840 with fixed positions, of which 12 x 768 + 8 x 512 are biases of keys.
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 111_907_840 - 12 * 768 - 8 * 512
