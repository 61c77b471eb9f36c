"""State dictionaries of unilm and transformers, and parity with transformers' networks."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import RectBivariateSpline
from torch.nn import functional as F
from transformers import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
)

from beit.classifier import BeitClassifier, Classification, classifier_from_pretraining
from beit.convert import (
    from_huggingface,
    from_timm,
    from_unilm,
    infer_config,
    to_huggingface,
    to_timm,
    to_unilm,
)
from beit.mim import BeitMIM, model_config
from beit.positions import geometric_offsets, resize_bias_table, resize_positions, spline_matrix
from beit.weights import load_weights, save_weights

ATOL = 2e-5  # float64 of the same network moves by 5-7e-6
SHARED = {
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
    **SHARED,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
}
PER_BLOCK = {**SHARED, "relative_positions": "per_block", "absolute_positions": True}


def randomised(model, seed=0, scale=0.02):
    """Every parameter random: no zero bias or unit norm hides an error in its place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=1.0 if name.endswith("bias_table") else scale)
    return model.eval()


def mim(config, **kwargs):
    return randomised(BeitMIM(**config), **kwargs)


def classifier(config, *, pooling="mean", **kwargs):
    config = {k: v for k, v in config.items() if k != "vocab_size"}
    return randomised(BeitClassifier(**config, num_classes=7, pooling=pooling), **kwargs)


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, 3, *model.image_size, generator=generator)
    mask = torch.rand(batch, model.num_patches, generator=generator) < 0.4
    return pixels, mask


@pytest.fixture(name="folder")
def _folder(tmp_path):
    def write(model, **kwargs):
        state, config = to_huggingface(model, **kwargs)
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def load_strictly(cls, folder, attention="eager"):
    network, info = cls.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention
    )
    problems = {k: v for k, v in info.items() if v}
    assert not problems, problems
    return network.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
def test_logits_and_loss_equal_transformers(config, attention, folder):
    model = mim(config)
    network = load_strictly(BeitForMaskedImageModeling, folder(model), attention)
    pixels, mask = inputs(model)
    targets = torch.randint(50, (int(mask.sum()),), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(pixels, mask)
        output = network(pixels, bool_masked_pos=mask, labels=targets)
    torch.testing.assert_close(logits, output.logits[mask], atol=ATOL, rtol=0)
    assert F.cross_entropy(logits, targets).item() == pytest.approx(output.loss.item(), abs=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("shared_bias", "tiny"),
        pytest.param("shared_bias", "base", marks=pytest.mark.long),
        ("plain", "tiny"),
        pytest.param("plain", "base", marks=pytest.mark.long),
    ],
)
def test_published_sizes_equal_transformers_and_survive_the_round_trip(size, architecture, folder):
    model = mim(model_config(size, architecture=architecture))
    path = folder(model)
    network = load_strictly(BeitForMaskedImageModeling, path)
    pixels, mask = inputs(model, batch=2)
    targets = torch.randint(8192, (int(mask.sum()),), generator=torch.Generator().manual_seed(2))
    saved = path / "saved_by_transformers"
    network.save_pretrained(saved)
    again = read_huggingface(saved)
    with torch.no_grad():
        logits = model(pixels, mask)
        output = network(pixels, bool_masked_pos=mask, labels=targets)
        assert torch.equal(again.eval()(pixels, mask), logits)
    assert logits.abs().mean() > 0.1
    torch.testing.assert_close(logits, output.logits[mask], atol=ATOL, rtol=0)
    assert F.cross_entropy(logits, targets).item() == pytest.approx(output.loss.item(), abs=ATOL)


def read_huggingface(folder):
    config = json.loads((folder / "config.json").read_text())
    return from_huggingface(load_file(folder / "model.safetensors"), config)


@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
def test_transformers_round_trip_is_bitwise(config, folder):
    for model, cls in (
        (mim(config), BeitForMaskedImageModeling),
        (classifier(config), BeitForImageClassification),
        (classifier(config, pooling="cls"), BeitForImageClassification),
    ):
        network = load_strictly(cls, folder(model))
        path = folder(model) / cls.__name__
        network.save_pretrained(path)
        in_memory = from_huggingface(network.state_dict(), network.config.to_dict())
        for again in (read_huggingface(path), in_memory):
            assert type(again) is type(model)
            assert again.config() == model.config()
            for name, value in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_equals_transformers(config, pooling, folder):
    model = classifier(config, pooling=pooling)
    network = load_strictly(BeitForImageClassification, folder(model))
    pixels, _ = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), network(pixels).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("config", [SHARED, PLAIN], ids=["shared", "plain"])
def test_encoder_of_a_pretrained_model_is_a_beit_model(config, folder):
    model = mim(config)
    path = folder(model, encoder_only=True)
    network = load_strictly(BeitModel, path)
    pixels, _ = inputs(model)
    with torch.no_grad():
        features = model.features(pixels)
        torch.testing.assert_close(features, network(pixels).last_hidden_state, atol=ATOL, rtol=0)
        again = read_huggingface(path)
        assert again.vocab_size == 0
        torch.testing.assert_close(again.eval().features(pixels), features, atol=0, rtol=0)


def test_pooled_encoder_of_a_classifier_is_a_beit_model(folder):
    model = classifier(PER_BLOCK)
    path = folder(model, encoder_only=True)
    network = load_strictly(BeitModel, path)
    pixels, _ = inputs(model)
    again = read_huggingface(path)
    assert again.num_classes == 0
    with torch.no_grad():
        pooled = again.eval()(pixels)
        torch.testing.assert_close(pooled, network(pixels).pooler_output, atol=ATOL, rtol=0)


def test_gradients_equal_those_of_transformers(folder):
    model = mim(SHARED).train()
    network = load_strictly(BeitForMaskedImageModeling, folder(model))
    pixels, mask = inputs(model)
    targets = torch.randint(50, (int(mask.sum()),), generator=torch.Generator().manual_seed(2))
    F.cross_entropy(model(pixels, mask), targets).backward()
    network(pixels, bool_masked_pos=mask, labels=targets).loss.backward()
    gradients = from_huggingface(
        {name: parameter.grad for name, parameter in network.named_parameters()},
        network.config.to_dict(),
    ).state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_loss_and_gradients_of_a_classifier_equal_those_of_transformers(pooling, folder):
    model = classifier(PER_BLOCK, pooling=pooling).train()
    network = load_strictly(BeitForImageClassification, folder(model))
    pixels, _ = inputs(model, batch=5)
    labels = torch.tensor([3, 0, 6, 3, 1])
    shares = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    loss, hits = Classification(model)(pixels, torch.stack((labels, labels), dim=1), shares)
    (loss / 5).backward()
    theirs = network(pixels, labels=labels)
    theirs.loss.backward()
    torch.testing.assert_close(loss / 5, theirs.loss, atol=1e-6, rtol=1e-6)
    assert hits == (theirs.logits.argmax(dim=1) == labels).sum()
    gradients = from_huggingface(
        {name: parameter.grad for name, parameter in network.named_parameters()},
        network.config.to_dict(),
    ).state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("make", [mim, classifier, partial(classifier, pooling="cls")])
@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
def test_unilm_round_trip_is_strict_and_bitwise(make, config):
    model = make(config)
    file = to_unilm(model)
    has_index = any(name.endswith("relative_position_index") for name in file["model"])
    assert has_index == (config["relative_positions"] != "none")
    again = from_unilm({**file, "epoch": 3, "optimizer": {}}, num_heads=4)
    assert type(again) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    again = from_unilm({"module": file["model"]}, num_heads=4)
    assert torch.equal(again.state_dict()["cls_token"], model.state_dict()["cls_token"])


def test_a_wrong_index_buffer_in_an_official_file_is_refused():
    file = to_unilm(mim({**SHARED, "image_size": (16, 64)}))
    with pytest.raises(ValueError, match="another patch grid"):
        from_unilm(file, image_size=(64, 16))
    assert from_unilm(file, image_size=(16, 64)).grid_size == (2, 8)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("layout", ["unilm", "huggingface", "timm"])
def test_every_defect_of_a_state_is_an_error_with_its_name(layout, change):
    model = mim(SHARED) if layout != "timm" else classifier(PER_BLOCK)
    if layout == "unilm":
        state = to_unilm(model)["model"]
        read = from_unilm
        name = "blocks.1.attn.proj.bias"
    elif layout == "timm":
        state, _ = to_timm(model)
        read = from_timm
        name = "blocks.1.attn.proj.bias"
    else:
        state, config = to_huggingface(model)
        name = "encoder.layer.1.attention.output.dense.bias"

        def read(state):
            return from_huggingface(state, config)

    given = name if layout != "huggingface" else "beit." + name
    if change == "missing":
        del state[given]
        message = f"missing: {name}"
    elif change == "unknown":
        stem = "beit.encoder.layer" if layout == "huggingface" else "blocks"
        state[f"{stem}.1.novelty"] = torch.zeros(3)
        message = rf"unknown: {stem.removeprefix('beit.')}\.1\.novelty"
    else:
        state[given] = torch.zeros(31)
        message = rf"{name} is \(31,\), expected \(32,\)"
    with pytest.raises(ValueError, match=message):
        read(state)


def test_missing_parts_of_a_split_projection_are_named():
    state, config = to_huggingface(mim(SHARED))
    del state["beit.encoder.layer.2.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.2\..*key\.weight"):
        from_huggingface(state, config)
    state, config = to_huggingface(mim(SHARED))
    state["beit.encoder.layer.2.attention.attention.key.bias"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"unknown: .*layer\.2.*key\.bias"):
        from_huggingface(state, config)


def test_other_computations_are_refused():
    state, config = to_huggingface(mim(SHARED))
    with pytest.raises(ValueError, match="hidden_act 'gelu_new'"):
        from_huggingface(state, {**config, "hidden_act": "gelu_new"})
    with pytest.raises(ValueError, match="model_type 'vit'"):
        from_huggingface(state, {**config, "model_type": "vit"})
    with pytest.raises(ValueError, match="not square"):
        to_huggingface(mim({**SHARED, "image_size": (16, 32)}))
    with pytest.raises(ValueError, match="not a BEiT"):
        infer_config({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="give num_heads"):
        from_unilm({"model": to_unilm(mim(PLAIN))["model"]})


@pytest.mark.parametrize("make", [mim, classifier, partial(classifier, pooling="cls")])
@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
def test_timm_round_trip_computes_the_same(make, config):
    model = make(config)
    state, arguments = to_timm(model)
    assert arguments["use_rel_pos_bias"] == (config["relative_positions"] != "none")
    again = from_timm(state, num_heads=4).eval()
    pixels, _ = inputs(model)
    with torch.no_grad():
        if make is mim:
            assert torch.equal(again.features(pixels), model.features(pixels))
        else:
            assert torch.equal(again(pixels), model(pixels))


def test_fine_tuning_starts_from_the_encoder_with_the_bias_in_every_block():
    model = mim(SHARED)
    tuned = classifier_from_pretraining(
        model, num_classes=9, drop_path=0.1, generator=torch.Generator().manual_seed(0)
    ).eval()
    pixels, _ = inputs(model)
    with torch.no_grad():
        before_norm = model.features(pixels, layer=3)
        torch.testing.assert_close(
            tuned.run_blocks(tuned.embed(pixels, None, None)), before_norm, atol=1e-6, rtol=0
        )
        assert tuned(pixels).shape == (3, 9)
        assert tuned(pixels).abs().max() < 0.01, "the head starts a thousandth of its size"
        wide = classifier_from_pretraining(model, num_classes=2000)
        assert wide.head.weight.std().item() == pytest.approx(2e-5, rel=0.02), "as upstream's"
    tables = [block.attn.relative_position_bias_table for block in tuned.blocks]
    assert len({table.data_ptr() for table in tables}) == 3
    shared = model.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(table, shared) for table in tables)


def test_a_second_fine_tuning_keeps_the_norm_and_the_head_where_it_is_asked_to():
    first = classifier(PER_BLOCK)
    again = partial(classifier_from_pretraining, first, num_classes=7, drop_path=0.3)
    kept = again(keep_head=True)
    assert kept.config() == {**first.config(), "drop_path": 0.3}
    for name, value in first.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    fresh = again().state_dict()
    differing = {name for name, value in first.state_dict().items() if (fresh[name] != value).any()}
    assert differing == {"head.weight", "head.bias"}
    assert classifier_from_pretraining(first, num_classes=2).num_classes == 2


def test_the_class_token_is_normed_as_in_pretraining():
    model = mim(SHARED)
    tuned = classifier_from_pretraining(model, num_classes=9, pooling="cls").eval()
    pixels, _ = inputs(model)
    with torch.no_grad():
        expected = model.features(pixels)[:, 0]
        torch.testing.assert_close(tuned.pooled(pixels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "expected"), [("base", 86_530_984), ("large", 304_430_568)])
def test_fine_tuning_networks_have_the_published_parameter_counts(size, expected):
    config = {**model_config(size), "relative_positions": "per_block"}
    del config["vocab_size"]
    with torch.device("meta"):
        model = BeitClassifier(**config, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_geometric_interpolation_equals_the_splines_of_scipy():
    generator = np.random.default_rng(0)
    table = torch.from_numpy(generator.normal(size=(27 * 27 + 3, 2)))
    resized = resize_bias_table(table, (14, 14), (24, 24))
    assert resized.shape == (47 * 47 + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])
    knots = geometric_offsets(13, 23)
    assert knots[-1] == pytest.approx(23, abs=1e-6)
    ratios = np.diff(knots[14:]) / np.diff(knots[13:-1])
    assert np.allclose(ratios, ratios[0])
    points = np.clip(np.arange(-23, 24.0), knots[0], knots[-1])
    for head in range(2):
        values = table[:-3, head].numpy().reshape(27, 27)
        expected = RectBivariateSpline(knots, knots, values, s=0)(points, points)
        assert np.abs(resized[:-3, head].numpy().reshape(47, 47) - expected).max() < 1e-9


def test_smaller_grids_keep_the_biases_of_their_distances():
    table = torch.randn(27 * 27 + 3, 2, generator=torch.Generator().manual_seed(0))
    small = resize_bias_table(table, (14, 14), (7, 5))
    middle = table[:-3].view(27, 27, 2)[7:20, 9:18]
    torch.testing.assert_close(small[:-3].view(13, 9, 2), middle, atol=1e-6, rtol=0)
    assert torch.equal(resize_bias_table(table, (14, 14), (14, 14)), table)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_splines_pass_through_their_knots_and_reproduce_cubics(count):
    knots = np.cumsum(np.linspace(1, 2, count))
    assert np.allclose(spline_matrix(knots, knots), np.eye(count), atol=1e-9)
    degree = min(count - 1, 3)
    points = np.linspace(knots[0], knots[-1], 31)
    assert np.allclose(spline_matrix(knots, points) @ knots**degree, points**degree)


@pytest.mark.parametrize("config", [SHARED, PLAIN, PER_BLOCK], ids=["shared", "plain", "per_block"])
def test_networks_move_to_other_image_sizes(config):
    model = mim(config)
    larger = resize_positions(model, (48, 40))
    assert larger.grid_size == (6, 5)
    assert not larger.training
    pixels, mask = inputs(larger)
    assert larger(pixels, mask).isfinite().all()
    same = resize_positions(model, 32)
    pixels, mask = inputs(model)
    assert torch.equal(same(pixels, mask), model(pixels, mask))
    for name, value in model.state_dict().items():
        if "bias_table" not in name and name != "pos_embed":
            assert torch.equal(larger.state_dict()[name], value)


def test_weights_folders_round_trip(tmp_path):
    model = mim({**SHARED, "image_size": (16, 24), "drop_path": 0.1})
    save_weights(model, tmp_path / "weights", extra={"pixel_mean": [0.5, 0.5, 0.5]})
    again = load_weights(tmp_path / "weights")
    assert again.config() == model.config()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_damaged_weights_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_weights(tmp_path)
    save_weights(mim(SHARED), tmp_path)
    other = copy.deepcopy(mim({**SHARED, "depth": 2}))
    save_weights(other, tmp_path / "other")
    (tmp_path / "other" / "weights.safetensors").replace(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.attn\.proj\.bias"):
        load_weights(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="format is not"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_weights(tmp_path)
