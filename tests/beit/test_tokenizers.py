"""Saving, loading and identity of tokenizers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beit.tokenizers import (
    DalleTokenizer,
    DvaeTokenizer,
    ImageTokenizer,
    KmeansTokenizer,
    ProjectionTokenizer,
    load_tokenizer,
    save_tokenizer,
)

MAKERS = {
    "dalle": lambda: DalleTokenizer(image_size=32, hidden_dim=8, init_dim=4, vocab_size=32),
    "dalle without decoder": lambda: DalleTokenizer(
        image_size=32, hidden_dim=8, vocab_size=32, has_decoder=False
    ),
    "dvae": lambda: DvaeTokenizer(image_size=16, patch_size=4, dim=16, vocab_size=32),
    "kmeans": lambda: KmeansTokenizer(image_size=16, patch_size=4, vocab_size=32),
    "projection": lambda: ProjectionTokenizer(
        image_size=16, patch_size=4, vocab_size=32, code_dim=8
    ),
}


@pytest.fixture(params=sorted(MAKERS))
def tokenizer(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


def test_round_trip(tokenizer, pictures, tmp_path):
    fingerprint = save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, ImageTokenizer)
    assert loaded.fingerprint() == fingerprint == tokenizer.fingerprint()
    assert (loaded.vocab_size, loaded.grid_size) == (32, (4, 4))
    assert torch.equal(loaded.encode(pictures), tokenizer.encode(pictures))
    assert not any(p.requires_grad for p in loaded.parameters())
    if loaded.has_decoder:
        token_ids = tokenizer.encode(pictures[:, :, : loaded.image_size, : loaded.image_size])
        assert torch.equal(loaded.decode(token_ids), tokenizer.decode(token_ids))
    match = loaded.match(pictures)
    assert torch.equal(match.token_ids, loaded.encode(pictures))
    assert torch.equal(match.logits, loaded.logits(pictures).amax(1).flatten(1))
    # Saving what was loaded gives the same bytes.
    save_tokenizer(loaded, tmp_path / "again")
    for name in ("tokenizer.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_fingerprint_covers_weights_and_configuration(tmp_path):
    torch.manual_seed(0)
    first = MAKERS["dvae"]()
    other_size = DvaeTokenizer(image_size=32, patch_size=4, dim=16, vocab_size=32)
    other_size.load_state_dict(first.state_dict())
    assert other_size.fingerprint() != first.fingerprint()
    nudged = MAKERS["dvae"]()
    nudged.load_state_dict(first.state_dict())
    nudged.encoder.head.bias.data[3] += 1e-6
    assert nudged.fingerprint() != first.fingerprint()


def test_float16_on_load(tmp_path, pictures):
    torch.manual_seed(0)
    fingerprint = save_tokenizer(MAKERS["dalle"](), tmp_path)
    half = load_tokenizer(tmp_path, precision="float16")
    assert half.precision == "float16"
    assert half.fingerprint() == fingerprint
    assert half.encode(pictures).shape == (4, 16)
    with pytest.raises(ValueError, match="save before rounding"):
        save_tokenizer(half, tmp_path / "half")
    save_tokenizer(MAKERS["dvae"](), tmp_path / "dvae")
    assert load_tokenizer(tmp_path / "dvae", precision="float16").encode(pictures).shape == (4, 64)
    with pytest.raises(ValueError, match="choose float32 or float16"):
        load_tokenizer(tmp_path, precision="bfloat16")
    save_tokenizer(MAKERS["kmeans"](), tmp_path / "kmeans")
    with pytest.raises(ValueError, match="'kmeans' has only float32"):
        load_tokenizer(tmp_path / "kmeans", precision="float16")


def rewrite(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def test_damage_is_named(tmp_path):
    good = tmp_path / "good"
    save_tokenizer(MAKERS["dvae"](), good)

    def damaged(name):
        target = tmp_path / name
        target.mkdir()
        for file in good.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")

    target = damaged("architecture")
    rewrite(target / "config.json", architecture="vqgan")
    with pytest.raises(ValueError, match=r"\['dalle', 'dvae', .*vqgan"):
        load_tokenizer(target)

    target = damaged("vocab")
    rewrite(target / "config.json", vocab_size=33)
    with pytest.raises(ValueError, match=r"\['vocab_size'\] contradict"):
        load_tokenizer(target)

    target = damaged("json")
    (target / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_tokenizer(target)

    target = damaged("truncated")
    weights = target / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="safetensors"):
        load_tokenizer(target)

    target = damaged("missing")
    weights = target / "tokenizer.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.head.bias"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"encoder\.head\.bias"):
        load_tokenizer(target)

    target = damaged("half")
    weights = target / "tokenizer.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="float32 expected"):
        load_tokenizer(target)


@pytest.mark.parametrize("kind", ["dalle", "dvae"])
def test_autocast_reaches_no_convolution_from_or_to_codes(kind):
    """Tokens are the largest of thousands of logits: rounded to bfloat16, many tie or change."""
    torch.manual_seed(0)
    tokenizer = MAKERS[kind]()
    side = tokenizer.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    first = {"dalle": lambda d: d.blocks.input, "dvae": lambda d: d.codebook}[kind]
    embedded = []
    first(tokenizer.decoder).register_forward_hook(lambda *given: embedded.append(given[-1].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = tokenizer.encoder(images)
        tokenizer.decoder(torch.softmax(logits, 1))
    assert (logits.dtype, embedded) == (torch.float32, [torch.float32])
    # bfloat16 has 128 values an octave; float32 logits hardly repeat.
    assert len(logits.unique()) > 0.99 * logits.numel()
