"""The DALL-E networks: layout, parity with transformers' FLAVA codebook, precision."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beit.tokenizers.dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from beit.tokenizers.discrete_vae import map_pixels, unmap_pixels


def flava_key(key: str) -> str:
    key = re.sub(r"(group_\d)\.", r"\1.group.", key).replace("res_path.", "res_path.path.")
    return re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", key))


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8)


def test_published_layout():
    with torch.device("meta"):
        encoder, decoder = DalleEncoder(), DalleDecoder()
    keys = encoder.state_dict()
    assert len(keys) == 74
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert keys["blocks.input.w"].shape == (256, 3, 7, 7)
    assert keys["blocks.group_4.block_1.id_path.w"].shape == (2048, 1024, 1, 1)
    assert keys["blocks.group_2.block_2.res_path.conv_4.b"].shape == (512,)
    assert keys["blocks.output.conv.w"].shape == (8192, 2048, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in keys
    keys = decoder.state_dict()
    assert len(keys) == 76
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    assert keys["blocks.group_1.block_1.res_path.conv_1.w"].shape == (512, 128, 1, 1)
    assert keys["blocks.group_1.block_1.res_path.conv_4.w"].shape == (2048, 512, 3, 3)
    assert keys["blocks.output.conv.w"].shape == (6, 256, 1, 1)


@pytest.mark.parametrize(("hidden_dim", "vocab_size"), [(16, 256), (32, 1024)])
def test_equals_the_flava_codebook_on_the_same_weights(hidden_dim, vocab_size):
    from transformers import FlavaImageCodebookConfig
    from transformers.models.flava.modeling_flava import FlavaImageCodebook

    torch.manual_seed(1)
    ours = DalleEncoder(hidden_dim=hidden_dim, vocab_size=vocab_size).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(std=0.1)
    theirs = FlavaImageCodebook(
        FlavaImageCodebookConfig(hidden_size=hidden_dim, vocab_size=vocab_size)
    ).eval()
    theirs.load_state_dict({flava_key(k): v for k, v in ours.state_dict().items()}, strict=True)
    pixels = map_pixels(images(4, 112))
    with torch.no_grad():
        got, expected = ours(pixels), theirs(pixels)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert torch.equal(got.argmax(1), theirs.get_codebook_indices(pixels))
    assert got.argmax(1).unique().numel() > 10


def test_pixels_are_mapped_as_unilm_does():
    picture = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    unit = picture.float() / 255  # ToTensor
    assert torch.equal(map_pixels(picture), (1 - 2 * 0.1) * unit + 0.1)
    assert torch.equal(unmap_pixels(map_pixels(picture)), picture)


def test_encode_decode_and_grid():
    tokenizer = DalleTokenizer(image_size=32, hidden_dim=8, init_dim=8, vocab_size=64)
    assert tokenizer.grid_size == (4, 4)
    token_ids = tokenizer.encode(images(3, 32))
    assert token_ids.shape == (3, 16)
    assert token_ids.dtype == torch.int64
    pixels = map_pixels(images(3, 32))
    assert torch.equal(token_ids, tokenizer.encoder(pixels).argmax(1).flatten(1))
    pictures = tokenizer.decode(token_ids)
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    # Any multiple of the stride encodes; the tokens of a batch do not depend on its size.
    assert tokenizer.encode(images(1, 64)).shape == (1, 64)
    assert torch.equal(tokenizer.encode(images(3, 32)[1:2]), token_ids[1:2])


def test_decoder_shares_the_one_hot_codebook():
    """The first 1x1 convolution on a one-hot map looks a code up, bias added."""
    decoder = DalleDecoder(hidden_dim=8, init_dim=4, vocab_size=16)
    token_ids = torch.tensor([[[3, 5], [0, 15]]])
    one_hot = F.one_hot(token_ids, 16).movedim(-1, 1).float()
    first = decoder.blocks.input(one_hot)
    looked_up = (
        decoder.blocks.input.w[:, token_ids[0], 0, 0] + decoder.blocks.input.b[:, None, None]
    )
    assert torch.equal(first[0], looked_up)


def test_float16_trunk_keeps_output_convolution_and_identity():
    torch.manual_seed(3)
    reference = DalleTokenizer(image_size=64, hidden_dim=32, vocab_size=512, has_decoder=False)
    half = DalleTokenizer(image_size=64, hidden_dim=32, vocab_size=512, has_decoder=False)
    half.load_state_dict(reference.state_dict())
    half.set_precision("float16")
    assert half.encoder.blocks.input.w.dtype == torch.float16
    assert half.encoder.blocks.group_4.block_2.res_path.conv_4.w.dtype == torch.float16
    assert half.encoder.blocks.output.conv.w.dtype == torch.float32
    assert half.fingerprint() == reference.fingerprint()
    pictures = images(8, 64)
    assert half.logits(pictures).dtype == torch.float32
    agree = (half.encode(pictures) == reference.encode(pictures)).float().mean()
    assert agree > 0.98, agree
    with pytest.raises(ValueError, match="load it again"):
        half.set_precision("float32")


def test_float16_trunk_computes_what_openai_computes_on_cuda():
    """Every convolution of the trunk on halves, the last in float32: emulated layer by layer.

    Ours adds the scaled residual in one rounding where OpenAI's rounds twice, so the two differ by
    roundings of float16, and ours is no farther from float32.
    """
    torch.manual_seed(4)
    encoder = DalleEncoder(hidden_dim=16, vocab_size=64).eval()
    weights = {k: v.clone() for k, v in encoder.state_dict().items()}

    def conv(x, prefix, dtype=torch.float16):
        w, b = (weights[f"{prefix}.{n}"].to(dtype) for n in "wb")
        return F.conv2d(x.to(dtype), w, b, padding=w.shape[-1] // 2)

    pixels = map_pixels(images(2, 32))
    with torch.no_grad():
        x = conv(pixels, "blocks.input")
        for g in range(1, 5):
            for k in (1, 2):
                base = f"blocks.group_{g}.block_{k}"
                y = x
                for j in range(1, 5):
                    y = conv(F.relu(y), f"{base}.res_path.conv_{j}")
                skip = conv(x, f"{base}.id_path") if f"{base}.id_path.w" in weights else x
                x = skip + y * (1 / 64)
            x = F.max_pool2d(x, 2) if g < 4 else x
        expected = conv(F.relu(x), "blocks.output.conv", torch.float32)
        exact = encoder(pixels)
        encoder.half_trunk()
        got = encoder(pixels)
    rounding = (expected - exact).abs().mean()
    assert (got - exact).abs().mean() <= 1.05 * rounding
    assert (got - expected).abs().mean() <= rounding
    assert (got.argmax(1) == expected.argmax(1)).float().mean() == 1


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "uint8"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 33, 32, dtype=torch.uint8), "33x32"),
    ],
)
def test_wrong_images_are_refused(picture, message):
    tokenizer = DalleTokenizer(image_size=32, hidden_dim=8, vocab_size=16, has_decoder=False)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(picture)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="choose 112"):
        DalleTokenizer(image_size=113, hidden_dim=8)
    with pytest.raises(ValueError, match="hidden_dim 6"):
        DalleEncoder(hidden_dim=6)
    with pytest.raises(ValueError, match="vocab_size 0"):
        DalleEncoder(vocab_size=0)
    with pytest.raises(ValueError, match="float32"):
        DalleEncoder(hidden_dim=8, vocab_size=8)(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    without = DalleTokenizer(image_size=32, hidden_dim=8, vocab_size=16, has_decoder=False)
    with pytest.raises(ValueError, match=r"decoder\.pkl"):
        without.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="4x4 grid"):
        DalleTokenizer(image_size=32, hidden_dim=8, init_dim=4, vocab_size=16).decode(
            torch.zeros(1, 15, dtype=torch.int64)
        )


def test_initialisation_is_openais():
    torch.manual_seed(0)
    encoder = DalleEncoder(hidden_dim=64, vocab_size=256)
    for module in encoder.modules():
        if (
            isinstance(module, nn.Module)
            and hasattr(module, "kernel_size")
            and hasattr(module, "w")
        ):
            fan_in = module.w[0].numel()
            assert module.w.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
            assert module.b.abs().max() == 0
