"""Published VQ-KD files: every form of them gives upstream's tokens; what is none is named."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from pipelines.config.import_tokenizer import ImportTokenizerConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.import_tokenizer import run
from pipelines.tables import tokenizer_store
from tests.beit.test_vqkd import images as pictures
from tests.beit.vqkd_peer import peer
from tests.pipelines.tokenizer_fixtures import disc, image_table


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory of files as upstream leaves them, and the network that they are of."""
    directory, model = tmp_path_factory.mktemp("published"), peer().eval()
    state = model.state_dict()
    teacher = {"teacher_model.proj": torch.ones(2), "scaling_layer.shift": torch.ones(3)}
    training = {"model": state | teacher, "epoch": 99, "args": argparse.Namespace(lr=1e-4),
                "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}  # fmt: skip
    torch.save(training, directory / "training.pth")
    torch.save({"state_dict": state}, directory / "mirror.pth")
    save_file(state, directory / "plain.safetensors")
    return directory, model


def settings(source, output, **changes):
    return ImportTokenizerConfig(
        source=str(source), output=str(output), tracking=TrackingConfig(enabled=False), **changes
    )


@pytest.mark.parametrize("name", ["training.pth", "mirror.pth", "plain.safetensors"])
def test_tokens_are_those_of_upstream(published, tmp_path, name):
    directory, model = published
    result = run(settings(directory / name, tmp_path / "out"))
    tokenizer = tokenizer_store.load(result.output)
    images = pictures()
    expected = model.tokens(images.float())
    assert torch.equal(tokenizer.encode(images), expected)
    assert len(expected.unique()) > 200
    assert (result.vocab_size, result.grid_size) == (700, (4, 4))
    manifest = tokenizer_store.read_manifest(result.output)
    assert manifest["source"]["files"][0]["role"] == "vqkd"
    assert "vqkd sha256" in result.summary()
    assert run(settings(directory / name, tmp_path / "out")).already_done


@pytest.mark.parametrize("size", [32, 64, 112])
def test_at_another_size_too(published, tmp_path, size):
    directory, model = published
    result = run(settings(directory / "mirror.pth", tmp_path / "out", image_size=size))
    assert result.grid_size == (size // 8, size // 8)
    images = pictures().repeat(1, 1, 4, 4)[:, :, :size, :size]
    found = tokenizer_store.load(result.output).encode(images)
    assert torch.equal(found, model.tokens(images.float()))
    with pytest.raises(InputError, match="holds another tokenizer"):
        run(settings(directory / "mirror.pth", tmp_path / "out", image_size=40))


def test_it_is_scored_and_shown_by_patches(published, tmp_path):
    directory, _ = published
    table = image_table(str(tmp_path / "images"), [disc(seed) for seed in range(12)])
    config = settings(directory / "mirror.pth", tmp_path / "out", images=table.uri, num_images=12)
    result = run(config)
    assert result.scorecard["num_images"] == 12
    assert "mse" not in result.scorecard
    assert tokenizer_store.load_patches(result.output).shape == (700, 3, 8, 8)


def test_what_does_not_fit_is_named(published, tmp_path):
    directory, model = published
    source = directory / "mirror.pth"
    with pytest.raises(InputError, match=r"decoder = .*: it holds a VQ-KD tokenizer, not a decod"):
        run(settings(source, tmp_path / "out", decoder=str(source)))
    with pytest.raises(InputError, match=r"source = .*: image_size 20 is not .*: choose 16"):
        run(settings(source, tmp_path / "out", image_size=20))

    def refused(match, **tensors):
        state = {name: value for name, value in (model.state_dict() | tensors).items()
                 if value is not None}  # fmt: skip
        torch.save({"model": state}, tmp_path / "bad.pth")
        with pytest.raises(InputError, match=match):
            run(settings(tmp_path / "bad.pth", tmp_path / "out"))

    encoder = {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)}
    torch.save({"model": encoder}, tmp_path / "beit.pth")
    with pytest.raises(InputError, match=r"source = .*no DALL-E network: .*or a VQ-KD file"):
        run(settings(tmp_path / "beit.pth", tmp_path / "out"))

    refused(r"no VQ-KD file has: head\.weight", **{"head.weight": torch.ones(2, 2)})
    refused(r"all zeros", **{"quantize.embedding.weight": torch.zeros(700, 8)})
    refused(r"no square", **{"encoder.pos_embed": torch.zeros(1, 16, 128)})
    refused(r"(?s)does not fit .*fc1\.weight", **{"encoder.blocks.1.mlp.fc1.weight": None})
    refused(r"encoder\.pos_embed.* is missing", **{"encoder.pos_embed": None})
    bias = torch.full((8,), float("nan"))
    refused(r"task_layer\.2\.bias holds values", **{"encode_task_layer.2.bias": bias})
    assert not (tmp_path / "out").exists()
