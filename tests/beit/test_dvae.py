"""The small discrete VAE: its losses against their definitions, and a codebook that is used."""

import math

import pytest
import torch
from torch.nn import functional as F

from beit.tokenizers.clustering import kmeans
from beit.tokenizers.discrete_vae import map_pixels
from beit.tokenizers.dvae import (
    DvaeTokenizer,
    exponential_noise,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_loss,
    mse_loss,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=64, size=16, seed=0):
    """White cards with a coloured disc: mostly one repeated patch, as flat artwork is."""
    generator = seeded(seed)
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    out = torch.full((count, 3, size, size), 255.0)
    for i in range(count):
        cy, cx = (torch.rand(2, generator=generator) * size).tolist()
        radius = 2 + 4 * float(torch.rand(1, generator=generator))
        colour = torch.rand(3, generator=generator) * 255
        inside = ((ys - cy) ** 2 + (xs - cx) ** 2) < radius**2
        out[i, :, inside] = colour[:, None]
    return out.to(torch.uint8)


def test_gumbel_softmax_is_the_relaxation():
    logits = torch.randn(2, 5, 3, 3, generator=seeded())
    noise = exponential_noise((2, 5, 3, 3), seeded(1))
    z = gumbel_softmax(logits, noise, 0.7)
    gumbel = -torch.log(noise)
    torch.testing.assert_close(z, F.softmax((logits + gumbel) / 0.7, dim=1))
    torch.testing.assert_close(z.sum(1), torch.ones(2, 3, 3))
    cold = gumbel_softmax(logits, noise, 1e-3)
    assert torch.equal(cold.argmax(1), (logits + gumbel).argmax(1))
    assert cold.amax(1).min() > 0.99
    # Extreme noise stays finite.
    edges = torch.tensor([2**-25, 17.4, 0.5, 0.5, 0.5]).view(1, 5, 1, 1).expand(2, 5, 3, 3)
    assert torch.isfinite(gumbel_softmax(logits, edges, 1 / 16)).all()


def test_exponential_noise():
    noise = exponential_noise((500_000,), seeded())
    assert noise.min() >= 2**-25
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    assert (noise > 3).float().mean().item() == pytest.approx(math.exp(-3), rel=0.03)
    assert torch.equal(noise, exponential_noise((500_000,), seeded()))


def test_gumbel_samples_follow_the_posterior():
    logits = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    noise = exponential_noise(logits.shape, seeded())
    share = torch.bincount(gumbel_softmax(logits, noise, 0.5).argmax(1).flatten()) / 20_000
    torch.testing.assert_close(share, F.softmax(logits[0].flatten(), 0), atol=0.01, rtol=0)


def test_logit_laplace_is_a_density():
    """exp(-loss) integrates to one over (0, 1), for every mu and b."""
    x = torch.linspace(1e-5, 1 - 1e-5, 200_001, dtype=torch.float64)
    for mu, log_scale in ((0.0, 0.0), (1.3, -1.0), (-2.0, -0.5)):
        density = []
        for chunk in x.split(20_001):
            pixels = chunk.float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
            outputs = torch.tensor([mu] * 3 + [log_scale] * 3).view(1, 6, 1, 1)
            outputs = outputs.expand(len(pixels), 6, 1, 1)
            density += [
                torch.exp(-logit_laplace_loss(outputs[i : i + 1], pixels[i : i + 1]))
                for i in range(0, len(pixels), 200)
            ]
        assert torch.stack(density).mean().item() == pytest.approx(1, abs=0.02)


def test_logit_laplace_by_hand_and_bounded():
    pixels = torch.full((1, 3, 1, 1), 0.7)
    outputs = torch.tensor([0.5] * 3 + [-1.0] * 3).view(1, 6, 1, 1)
    logit = math.log(0.7 / 0.3)
    expected = abs(logit - 0.5) / math.exp(-1) - 1 + math.log(2) + math.log(0.7) + math.log(0.3)
    assert logit_laplace_loss(outputs, pixels).item() == pytest.approx(expected, rel=1e-5)
    exact = torch.tensor([logit] * 3 + [-50.0] * 3).view(1, 6, 1, 1)
    floor = logit_laplace_loss(exact, pixels, min_log_scale=-4.0).item()
    assert floor == pytest.approx(-4 + math.log(2) + math.log(0.7) + math.log(0.3), abs=1e-3)
    assert mse_loss(exact, pixels).item() == pytest.approx(0, abs=1e-9)


def test_kl_terms():
    uniform = torch.zeros(2, 8, 3, 3)
    assert kl_to_uniform(uniform).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(2, 8, 3, 3)
    certain[:, 2] = 100
    assert kl_to_uniform(certain).item() == pytest.approx(math.log(8), rel=1e-5)
    # Every token certain, all codes equally used: full KL.
    spread = torch.zeros(8, 8, 1, 1)
    spread[torch.arange(8), torch.arange(8)] = 100
    assert kl_to_uniform(spread).item() == pytest.approx(math.log(8), rel=1e-5)


def test_kmeans_finds_rare_colours_among_repeats():
    common = torch.zeros(5000, 3)
    rare = torch.eye(3).repeat(5, 1) * 2
    centres, error = kmeans(torch.cat([common, rare]), 4, generator=seeded(), num_iterations=5)
    assert error == pytest.approx(0, abs=1e-6)
    assert {tuple(c) for c in centres.round().int().tolist()} == {
        (0, 0, 0), (2, 0, 0), (0, 2, 0), (0, 0, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match="lower vocab_size"):
        kmeans(common[:3], 4, generator=seeded(), num_iterations=1)
    # Fewer distinct points than centres is no error; the rest are duplicates.
    centres, _ = kmeans(common, 8, generator=seeded(), num_iterations=2)
    assert centres.shape == (8, 3)


@pytest.mark.parametrize("dim", [48, 64, 24])
def test_initialisation_uses_the_codebook_and_reconstructs(dim):
    torch.manual_seed(0)
    tokenizer = DvaeTokenizer(image_size=16, patch_size=4, dim=dim, vocab_size=64)
    train, held_out = pictures(256), pictures(64, seed=9)
    before = tokenizer.encode(train).unique().numel()
    tokenizer.initialise_from(train, generator=seeded())
    token_ids = tokenizer.encode(train)
    assert token_ids.unique().numel() >= 48 > before
    reconstruction = tokenizer.decode(tokenizer.encode(held_out))
    mse = ((reconstruction.float() - held_out.float()) / 255).square().mean()
    grey = ((held_out.float().mean((0, 2, 3), keepdim=True) - held_out.float()) / 255).square()
    # 64 centres for discs in random colours; 24 channels hold principal components of a patch.
    assert mse < 0.3 * grey.mean()
    # Pure function of images and seed.
    torch.manual_seed(0)
    again = DvaeTokenizer(image_size=16, patch_size=4, dim=dim, vocab_size=64)
    again.initialise_from(train, generator=seeded())
    assert again.fingerprint() == tokenizer.fingerprint()


def test_training_step_improves_and_reaches_every_parameter():
    torch.manual_seed(0)
    tokenizer = DvaeTokenizer(image_size=16, patch_size=4, dim=48, vocab_size=32)
    train = pictures(64)
    tokenizer.initialise_from(train, generator=seeded())
    pixels = map_pixels(train)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    losses = []
    for step in range(20):
        logits = tokenizer.encoder(pixels)
        noise = exponential_noise(logits.shape, seeded(step))
        outputs = tokenizer.decoder(gumbel_softmax(logits, noise, 1.0))
        loss = logit_laplace_loss(outputs, pixels) + 0.1 * kl_to_uniform(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.parameters())
    assert losses[-1] < losses[0] - 0.1


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="vocab_size 0"):
        DvaeTokenizer(image_size=16, patch_size=4, dim=8, vocab_size=0)
    with pytest.raises(ValueError, match="image_size 18"):
        DvaeTokenizer(image_size=18, patch_size=4, dim=8, vocab_size=8)
