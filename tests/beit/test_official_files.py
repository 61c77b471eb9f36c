"""Official files of BEiT v2 and MAE: read whole, read as encoders, written back."""

import argparse
import pathlib

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from beit.classifier import BeitClassifier
from beit.convert import from_unilm, to_unilm
from beit.convert_mae import from_mae, to_mae
from beit.foreign import (
    IMAGENET_MEAN,
    load_network,
    load_whole,
    pixel_statistics,
    write_huggingface,
    write_mae,
)
from beit.mae import MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM
from beit.positions import resize_positions

SMALL = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 4, "num_heads": 1}
BEIT = {
    **SMALL,
    "absolute_positions": False,
    "relative_positions": "shared",
    "vocab_size": 30,
    "layer_scale_init": 0.1,
}
PLAIN = {
    **SMALL,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
}
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 1}


def randomised(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def batch():
    """Images, and masks that hide 12 of the 16 patches of each."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    noise = torch.rand(2, 16, generator=generator)
    return pixels, noise, noise.argsort(dim=1).argsort(dim=1) >= 4


@pytest.fixture(name="v2")
def _v2():
    return randomised(BeitV2MIM(**BEIT, early_layer=2))


class TestBeitV2:
    def test_a_training_save_keeps_its_aggregation_head(self, v2, tmp_path):
        options = argparse.Namespace(
            early_layers=2, lr=np.float64(1.5e-3), output_dir=pathlib.Path("out"), seed=np.int64(0)
        )
        saved = {f"module.{name}": value for name, value in to_unilm(v2)["model"].items()}
        torch.save({"model": saved, "args": options, "epoch": 3}, tmp_path / "checkpoint.pth")
        whole = load_whole(tmp_path / "checkpoint.pth")
        assert whole.config() == v2.config()
        pixels, _, mask = batch()
        with torch.no_grad():
            assert torch.equal(whole.eval()(pixels, mask), v2(pixels, mask))

    def test_without_it_the_encoder_is_the_same(self, v2, tmp_path):
        torch.save(to_unilm(v2), tmp_path / "checkpoint.pth")
        plain = load_network(tmp_path / "checkpoint.pth").eval()
        assert type(plain) is BeitMIM
        pixels, _, mask = batch()
        with torch.no_grad():
            assert torch.equal(plain.features(pixels), v2.features(pixels))
            assert torch.equal(plain(pixels, mask), v2(pixels, mask)[0])

    def test_the_early_layer_is_the_published_one_where_nothing_tells(self, v2):
        assert from_unilm({"model": to_unilm(v2)["model"]}).early_layer == SMALL["depth"] - 3
        assert from_unilm(to_unilm(v2)).early_layer == 2
        assert from_unilm({**to_unilm(v2), "args": {"early_layers": 3}}).early_layer == 3
        assert from_unilm({**to_unilm(v2), "args": {"early_layers": "x"}}).early_layer == 1

    def test_a_head_of_its_own_is_refused_by_name(self, v2):
        state = {**to_unilm(v2)["model"], "cls_pt_lm_head.weight": torch.zeros(30, 64)}
        with pytest.raises(ValueError, match=r"unknown: cls_pt_lm_head\.weight"):
            from_unilm(state)


@pytest.fixture(name="peer")
def _peer():
    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=1,
        intermediate_size=256, decoder_hidden_size=32, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=1, decoder_intermediate_size=128, layer_norm_eps=1e-6,
        mask_ratio=0.75,
    )  # fmt: skip
    return randomised(ViTMAEForPreTraining(config))


class TestMae:
    def test_a_folder_of_transformers_paints_the_same(self, peer, tmp_path):
        peer.save_pretrained(tmp_path)
        network = load_whole(tmp_path).eval()
        assert isinstance(network, MaeNetwork)
        pixels, noise, mask = batch()
        with torch.no_grad():
            expected = peer(pixels, noise=noise)
            assert torch.equal(expected.mask.bool(), mask)
            painted = network(pixels, mask)
        torch.testing.assert_close(painted, expected.logits[mask], atol=2e-6, rtol=1e-5)

    def test_transformers_paints_the_same_from_ours(self, tmp_path):
        network = randomised(MaeNetwork(**PLAIN, **DECODER))
        write_huggingface(network, tmp_path)
        peer, told = ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        pixels, noise, mask = batch()
        with torch.no_grad():
            painted = peer.eval()(pixels, noise=noise).logits[mask]
            torch.testing.assert_close(network(pixels, mask), painted, atol=2e-6, rtol=1e-5)
        again = load_whole(tmp_path)
        assert again.config() == network.config()
        for name, value in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    def test_an_encoder_of_transformers_has_no_decoder(self, peer, tmp_path):
        ViTMAEModel(peer.config).save_pretrained(tmp_path)
        assert type(load_whole(tmp_path)) is BeitMIM

    def test_an_official_file_comes_back_bit_for_bit(self, tmp_path):
        network = randomised(MaeNetwork(**PLAIN, **DECODER))
        torch.save(to_mae(network), tmp_path / "mae_pretrain_full.pth")
        again = load_whole(tmp_path / "mae_pretrain_full.pth")
        assert again.config() == network.config()
        for name, value in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    def test_what_the_official_layout_lacks_is_nothing(self):
        """Keys have a bias there; it moves all logits of a query alike, and so no output."""
        network = randomised(MaeNetwork(**PLAIN, **DECODER))
        state = to_mae(network)["model"]
        fused = state["blocks.0.attn.qkv.bias"]
        assert not fused.chunk(3)[1].any()
        state["blocks.0.attn.qkv.bias"] = fused + torch.cat(
            [torch.zeros(64), torch.ones(64), torch.zeros(64)]
        )
        pixels, _, mask = batch()
        with torch.no_grad():
            assert torch.equal(from_mae(state).eval()(pixels, mask), network(pixels, mask))

    def test_the_encoder_alone_is_read_and_written(self, tmp_path):
        encoder = randomised(MaeNetwork(**PLAIN, **DECODER)).plain()
        file = to_mae(encoder)
        assert "mask_token" not in file["model"]
        torch.save(file, tmp_path / "mae_pretrain.pth")
        again = load_network(tmp_path / "mae_pretrain.pth").eval()
        pixels, *_ = batch()
        with torch.no_grad():
            assert torch.equal(again.features(pixels), encoder.eval().features(pixels))
        assert pixel_statistics(tmp_path / "mae_pretrain.pth")[0] == IMAGENET_MEAN

    def test_pixels_and_heads_that_are_no_default_are_told_beside_the_tensors(self, tmp_path):
        network = randomised(MaeNetwork(**PLAIN, **{**DECODER, "decoder_heads": 4}))
        write_mae(network, tmp_path, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        assert pixel_statistics(tmp_path) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert load_whole(tmp_path).decoder_heads == 4

    def test_a_decoder_moves_to_another_image_size(self):
        network = randomised(MaeNetwork(**PLAIN, **DECODER))
        larger = resize_positions(network, 48)
        assert larger.decoder_pos_embed.shape == (1, 37, 32)
        assert torch.equal(larger.decoder_pos_embed[:, 0], network.decoder_pos_embed[:, 0])

    def test_what_no_mae_file_can_hold_is_refused(self, v2):
        with pytest.raises(ValueError, match="use format unilm"):
            to_mae(v2.plain())
        state = {**to_mae(MaeNetwork(**PLAIN, **DECODER))["model"], "head.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"unknown: head\.weight"):
            from_mae(state)

    def test_a_classifier_is_none(self):
        with pytest.raises(ValueError, match="use format unilm, hf or timm"):
            to_mae(BeitClassifier(**PLAIN, num_classes=3))


@pytest.mark.parametrize(("imagenet", "mean"), [(True, IMAGENET_MEAN), (False, (0.5, 0.5, 0.5))])
def test_options_of_a_training_save_tell_how_pixels_were_normalised(v2, tmp_path, imagenet, mean):
    options = argparse.Namespace(imagenet_default_mean_and_std=imagenet)
    torch.save({**to_unilm(v2), "args": options}, tmp_path / "checkpoint.pth")
    assert pixel_statistics(tmp_path / "checkpoint.pth")[0] == mean


@pytest.mark.parametrize("args", [{}, {"args": 3}, {"args": ["--lr", "1"]}])
def test_a_bare_file_does_not_tell(v2, tmp_path, args):
    torch.save({"model": to_unilm(v2)["model"], **args}, tmp_path / "checkpoint.pth")
    assert pixel_statistics(tmp_path) is None
    assert load_whole(tmp_path).early_layer == 1
