"""The export stage: a run to other libraries and back, and published weights to ours."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import BeitForMaskedImageModeling, BeitImageProcessor, BeitModel

from beit.classifier import BeitClassifier
from beit.foreign import (
    load_network,
    load_whole,
    pixel_statistics,
    write_huggingface,
    write_onnx,
    write_unilm,
)
from beit.mim import BeitMIM, BeitV2MIM
from beit.weights import load_weights, save_weights
from pipelines.config.export import ExportConfig
from pipelines.errors import InputError
from pipelines.export import run
from pipelines.tables.weights_store import open_network

CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 128,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}
EXTRA = {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.4, 0.5, 0.6], "run_id": "abc"}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(name="model")
def _model():
    return randomised(BeitMIM(**CONFIG))


@pytest.fixture(name="run_uri")
def _run_uri(tmp_path, model):
    save_weights(model, tmp_path / "run" / "weights", extra=EXTRA)
    (tmp_path / "run" / "run.json").write_text("{}")
    return str(tmp_path / "run")


def export(run_uri, tmp_path, **options):
    output = str(tmp_path / "out" / "-".join(str(v) for v in options.values()))
    return run(ExportConfig(run=run_uri, output=output, **options)), output


def pixels(batch=3, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def test_hugging_face_loads_the_export_and_normalises_as_in_training(run_uri, tmp_path, model):
    result, output = export(run_uri, tmp_path, format="hf")
    assert result.largest_difference == 0
    assert "BeitForMaskedImageModeling.from_pretrained" in result.summary()
    network, info = BeitForMaskedImageModeling.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(6)) < 0.5
    with torch.no_grad():
        expected = model(pixels(), mask, all_tokens=True)
        logits = network.eval()(pixels(), bool_masked_pos=mask).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    processor = BeitImageProcessor.from_pretrained(output)
    image = np.full((50, 40, 3), 51, dtype=np.uint8)
    prepared = processor(image, return_tensors="np")["pixel_values"]
    assert prepared.shape == (1, 3, 32, 32)
    expected = (0.2 - np.array(EXTRA["pixel_mean"])) / np.array(EXTRA["pixel_std"])
    assert np.allclose(prepared.mean((0, 2, 3)), expected, atol=1e-4)


def test_an_export_that_was_killed_goes_on_and_another_one_is_refused(run_uri, tmp_path):
    """Of what it would write, an output may hold whatever is whole."""
    _, output = export(run_uri, tmp_path, format="hf")
    whole = {path.name: path.read_bytes() for path in Path(output).iterdir()}
    Path(output, "config.json").unlink()
    export(run_uri, tmp_path, format="hf")
    assert {path.name: path.read_bytes() for path in Path(output).iterdir()} == whole
    Path(output, "model.safetensors").write_bytes(b"another")
    Path(output, ".draft.0123abcd.tmp").write_text("half written, and not by us")
    there = sorted(Path(output).rglob("*"))
    with pytest.raises(InputError, match=r"holds files already, the first is 'model.safetensors'"):
        export(run_uri, tmp_path, format="hf")
    assert sorted(Path(output).rglob("*")) == there


def test_what_lies_in_a_store_is_copied_before_libraries_open_it(run_uri):
    output = "memory://exports/hf?a=b"
    result = run(ExportConfig(run=run_uri, output=output, format="hf", encoder_only=True))
    assert result.use == "copied to a disk: BeitModel.from_pretrained('hf')"


def test_hugging_face_encoder_only(run_uri, tmp_path, model):
    _, output = export(run_uri, tmp_path, format="hf", encoder_only=True)
    network, info = BeitModel.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        hidden = network.eval()(pixels()).last_hidden_state
        torch.testing.assert_close(hidden, model.features(pixels()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("fmt", ["hf", "unilm", "weights"])
def test_every_format_comes_back_bitwise(run_uri, tmp_path, model, fmt):
    result, output = export(run_uri, tmp_path, format=fmt)
    assert result.largest_difference == 0
    # An official file does not tell how pixels were normalised.
    told = {"pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (0.4, 0.5, 0.6)} if fmt == "unilm" else {}
    again = str(tmp_path / "again")
    back = run(ExportConfig(run=output, output=again, format="weights", image_size=32, **told))
    assert back.largest_difference == 0
    restored = load_weights(again)
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    extra = json.loads((tmp_path / "again" / "config.json").read_text())["extra"]
    if fmt == "hf":
        assert extra == {k: EXTRA[k] for k in ("pixel_mean", "pixel_std")}
    elif fmt == "weights":
        assert extra == EXTRA


def test_timm_export_is_read_back(run_uri, tmp_path, model):
    result, output = export(run_uri, tmp_path, format="timm")
    assert result.largest_difference == 0
    config = json.loads((tmp_path / "out" / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == EXTRA["pixel_mean"]
    with torch.no_grad():
        assert torch.equal(load_network(output).eval().features(pixels()), model.features(pixels()))


def test_onnx_runtime_computes_the_features_for_any_batch(run_uri, tmp_path, model):
    result, output = export(run_uri, tmp_path, format="onnx")
    assert result.largest_difference < 1e-4
    session = onnxruntime.InferenceSession(f"{output}/encoder.onnx")
    for batch in (1, 5):
        found = session.run(None, {"pixels": pixels(batch).numpy()})[0]
        expected = model.features(pixels(batch)).detach().numpy()
        assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_onnx_of_a_non_square_plain_classifier(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "vocab_size"}
    config |= {"image_size": (16, 40), "absolute_positions": True, "relative_positions": "none"}
    model = randomised(BeitClassifier(**config, num_classes=5)).train()
    write_onnx(model, tmp_path)
    assert model.training, "the mode is restored"
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    images = torch.randn(4, 3, 16, 40, generator=torch.Generator().manual_seed(5))
    found = session.run(None, {"pixels": images.numpy()})[0]
    assert np.abs(found - model.eval()(images).detach().numpy()).max() < 1e-4


def test_a_timm_folder_as_published_has_no_arguments(run_uri, tmp_path, model):
    _, output = export(run_uri, tmp_path, format="timm")
    config = json.loads((tmp_path / "out" / "timm" / "config.json").read_text())
    for arguments in ({}, {"model_args": {}}, {"model_args": None}):
        told = {k: v for k, v in config.items() if k != "model_args"} | arguments
        (tmp_path / "out" / "timm" / "config.json").write_text(json.dumps(told))
        with torch.no_grad():
            found = load_network(output).eval().features(pixels())
            assert torch.equal(found, model.features(pixels()))
        assert open_network(output, image_size=48).network.grid_size == (6, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"out/hf/preprocessor_config\.json is not JSON"),
        ('{"image_mean": 0.5, "image_std": [1, 1, 1]}', r"image_mean = 0\.5: expected three numb"),
        ('{"image_mean": [0, 0, 0], "image_std": ["a", 1, 1]}', r"image_std = \['a', 1, 1\]: exp"),
    ],
)
def test_a_damaged_image_processor_is_named(run_uri, tmp_path, text, message):
    _, output = export(run_uri, tmp_path, format="hf")
    (tmp_path / "out" / "hf" / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_network(output)


def test_an_image_processor_may_leave_out_the_normalisation(run_uri, tmp_path):
    _, output = export(run_uri, tmp_path, format="hf")
    (tmp_path / "out" / "hf" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert open_network(output).extra == {}


def test_positions_are_resized_on_the_way_out(run_uri, tmp_path):
    _, output = export(run_uri, tmp_path, format="hf", image_size=48)
    assert BeitModel.from_pretrained(output).config.image_size == 48
    assert load_network(output).grid_size == (6, 6)


def test_a_published_file_is_resized_too(tmp_path, model):
    write_unilm(model, tmp_path)
    config = ExportConfig(
        run=str(tmp_path / "checkpoint.pth"), output=str(tmp_path / "out"), format="timm",
        image_size=48, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    run(config)
    assert load_network(tmp_path / "out").grid_size == (6, 6)
    assert pixel_statistics(tmp_path / "out") == ([0.5] * 3, [0.5] * 3)


def test_a_local_name_may_have_a_question_mark(tmp_path, model):
    write_unilm(model, tmp_path)
    (tmp_path / "checkpoint.pth").rename(tmp_path / "which?.pth")
    stored = open_network(str(tmp_path / "which?.pth"))
    assert stored.uri.endswith("which?.pth")
    assert torch.equal(stored.network.cls_token, model.cls_token)


def test_pixel_statistics_are_never_guessed(tmp_path, model):
    write_unilm(model, tmp_path)
    for form in ("hf", "timm", "weights"):
        with pytest.raises(InputError, match=r"give --pixel_mean and --pixel_std"):
            run(ExportConfig(run=str(tmp_path), output=str(tmp_path / "out"), format=form))
    with pytest.raises(InputError, match="give both or neither"):
        ExportConfig(run=str(tmp_path), output="out", pixel_mean=(0.5, 0.5, 0.5))


def test_official_files_keep_what_only_pretraining_needs(tmp_path):
    network = randomised(BeitV2MIM(**CONFIG, early_layer=1))
    write_unilm(network, tmp_path)
    output = str(tmp_path / "out")
    assert (
        run(ExportConfig(run=str(tmp_path), output=output, format="unilm")).largest_difference == 0
    )
    assert isinstance(load_whole(output), BeitV2MIM)


def test_official_training_saves_with_options_inside_are_read(tmp_path, model):
    write_unilm(model, tmp_path / "pub")
    file = tmp_path / "pub" / "checkpoint.pth"
    saved = torch.load(file, weights_only=True)
    torch.save(
        {**saved, "epoch": 799, "args": argparse.Namespace(imagenet_default_mean_and_std=True)},
        file,
    )
    for place in (file, file.parent):
        result = run(
            ExportConfig(
                run=str(place), output=str(tmp_path / f"from-{place.name}"), format="weights"
            )
        )
        assert result.largest_difference == 0
        assert torch.equal(load_weights(tmp_path / f"from-{place.name}").cls_token, model.cls_token)


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/beit-export-bomb", "w"))


def test_nothing_in_a_file_is_executed(tmp_path):
    file = tmp_path / "bad.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Bomb()}, file)
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        run(ExportConfig(run=str(file), output=str(tmp_path / "out"), format="hf"))


def test_bad_inputs_are_named(run_uri, tmp_path, model):
    save_weights(model, tmp_path / "odd", extra={})
    written = json.loads((tmp_path / "odd" / "config.json").read_text())
    written = {key: value for key, value in written.items() if "seal" not in key}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(written | {"extra": 5}))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    empty = str(tmp_path / "empty")
    for source, output, message in [
        (str(tmp_path / "nowhere"), empty, "nowhere: nothing is there"),
        (str(tmp_path / "nowhere.pth"), empty, "there is no such file"),
        (str(tmp_path / "unfinished"), empty, "no finished weights yet"),
        (str(tmp_path / "other"), empty, "describes no BEiT"),
        (run_uri, str(tmp_path / "used"), "holds files already"),
        (str(tmp_path / "odd"), empty, r"config\.json: `extra` is 5, and no object"),
    ]:
        with pytest.raises(InputError, match=message):
            run(ExportConfig(run=source, output=output, format="hf"))
    with pytest.raises(InputError, match="not divisible by patch_size 8"):
        run(ExportConfig(run=run_uri, output=empty, image_size=50))
    with pytest.raises(InputError, match="choose hf, timm"):
        ExportConfig(run=run_uri, output=empty, format="keras")
    with pytest.raises(InputError, match="goes with format hf"):
        ExportConfig(run=run_uri, output=empty, format="onnx", encoder_only=True)
    non_square = randomised(BeitMIM(**{**CONFIG, "image_size": (16, 32)}))
    with pytest.raises(ValueError, match="not square"):
        write_huggingface(non_square, tmp_path / "hf")
