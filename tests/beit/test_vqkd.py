"""VQ-KD against upstream's computation, its codebook rules, its start, its precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beit.teachers import Teacher
from beit.tokenizers import VqkdTokenizer, load_tokenizer, save_tokenizer
from beit.tokenizers.vqkd import initialise_, restarted
from beit.tokenizers.vqkd_import import vqkd_from
from tests.beit.vqkd_peer import peer


def images(count=60, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_tokens_are_those_of_upstream():
    model = peer().eval()
    tokenizer = vqkd_from(model.state_dict())
    pictures = images()
    expected = model.tokens(pictures.float())
    assert torch.equal(tokenizer.encode(pictures), expected)
    assert len(expected.unique()) > 200
    match = tokenizer.match(pictures)
    states = tokenizer.states(pictures)
    cosines = (states * tokenizer.codebook[expected]).sum(-1)
    torch.testing.assert_close(match.logits, cosines - 0.5, atol=1e-5, rtol=0)
    torch.testing.assert_close(states.norm(dim=-1), torch.ones(60, 16))


def test_dead_codes_start_again_at_the_candidates():
    codebook = F.normalize(torch.randn(6, 4), dim=1)
    usage = torch.tensor([5.0, 0.1, 3.0, 0.2, 0.0, 9.0])
    candidates = F.normalize(torch.randn(2, 4), dim=1)
    moved, counted = restarted(codebook, usage, candidates, least=1.0, fresh=4.0)
    assert torch.equal(moved[[1, 3]], candidates)
    assert torch.equal(moved[[0, 2, 4, 5]], codebook[[0, 2, 4, 5]])  # the third one waits
    assert counted.tolist() == [5.0, 4.0, 3.0, 4.0, 0.0, 9.0]
    same, _ = restarted(codebook, usage, candidates, least=0.0, fresh=4.0)
    assert torch.equal(same, codebook)


def small(**changes):
    options = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2,
               "vocab_size": 50, "code_dim": 8}  # fmt: skip
    return VqkdTokenizer(**{**options, **changes})


def test_it_starts_as_upstream_does():
    torch.manual_seed(0)
    tokenizer = small(dim=256, depth=2)
    second = tokenizer.encoder.blocks[1]
    assert second.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert second.mlp.fc1.weight.abs().max() > 0.06  # not cut at one deviation
    assert second.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert tokenizer.encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert tokenizer.task_layer[0].bias.abs().max() == 0
    conv = nn.Conv2d(3, 256, 8, stride=8)
    found = tokenizer.encoder.patch_embed.proj.weight.std().item()
    assert found == pytest.approx(conv.weight.std().item(), rel=0.05)
    before = tokenizer.encoder.blocks[0].attn.qkv.weight.clone()
    initialise_(tokenizer)
    assert not torch.equal(before, tokenizer.encoder.blocks[0].attn.qkv.weight)


def test_half_precision_rounds_the_transformer_only(tmp_path):
    model = peer().eval()
    tokenizer = vqkd_from(model.state_dict())
    fingerprint = save_tokenizer(tokenizer, tmp_path)
    half = load_tokenizer(tmp_path, precision="float16")
    assert half.fingerprint() == fingerprint
    assert half.encoder.blocks[0].mlp.fc1.weight.dtype == torch.float16
    assert half.task_layer[2].weight.dtype == half.codebook.dtype == torch.float32
    assert half.states(images(4)).dtype == torch.float32
    pictures = images()
    agreement = (half.encode(pictures) == tokenizer.encode(pictures)).float().mean()
    assert agreement > 0.97


def test_a_codebook_of_another_precision_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tokenizer(small(), tmp_path)
    file = tmp_path / "tokenizer.safetensors"
    tensors = load_file(file)
    tensors["codebook"] = tensors["codebook"].half()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"codebook is torch.float16, float32 expected"):
        load_tokenizer(tmp_path)


def test_other_image_sizes_are_refused():
    with pytest.raises(ValueError, match="divide into tokens of 8x8"):
        small().encode(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"built for \(32, 32\)"):
        small().encode(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


def test_a_teacher_sees_normalised_pixels_at_its_own_size():
    seen = []

    def network(pixels):
        seen.append(pixels)
        return pixels.flatten(2).transpose(1, 2).half()

    teacher = Teacher(
        network=network, image_size=16, grid_size=(16, 16), dim=3, mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4), name="pixels", weights="w", fingerprint="f",
    )  # fmt: skip
    pictures = images(2, 16)
    features = teacher.features(pictures)
    assert features.dtype == torch.float32
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = (pictures / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(seen[0], expected)
    flat = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    teacher.features(flat)
    assert seen[1].shape == (1, 3, 16, 16)
    torch.testing.assert_close(seen[1][0, :, 3, 5], (1 - mean) / std)
