"""Tokenizers that are placed and not trained, through the stages: made, kept, used, judged."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines import painting
from pipelines.config.train_tokenizer import GateConfig, ModelConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tables import tokenizer_store
from pipelines.train_tokenizer import run
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table

KINDS = ("kmeans", "projection")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(70)])


def config_for(kind, images, output, **model):
    sizes = {"image_size": 16, "patch_size": 4, "vocab_size": 32, "code_dim": 8}
    config = settings(images, output, model=ModelConfig(**{"kind": kind, **sizes, **model}))
    # Where nothing is trained a batch may be larger than the table.
    return replaced(config, "data", global_batch_size=4096)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, images, tmp_path_factory):
    config = config_for(request.param, images, tmp_path_factory.mktemp(request.param) / "out")
    return config, run(config)


def test_what_comes_out(finished, images):
    config, result = finished
    tokenizer = tokenizer_store.load(result.output)
    assert tokenizer.architecture == config.model.kind
    assert tokenizer.fingerprint() == result.fingerprint
    manifest = tokenizer_store.read_manifest(result.output)
    assert manifest["source"]["options"]["model.kind"] == config.model.kind
    assert manifest["source"]["image_table"] == images.fingerprint
    assert result.scorecard["codes_used"] >= 12
    assert ("mse" in result.scorecard) == (config.model.kind == "kmeans")
    assert ("reconstruction error" in result.summary()) == (config.model.kind == "kmeans")
    assert run(config).already_done
    with pytest.raises(InputError, match="seed: 0 != 1"):
        run(dataclasses.replace(config, seed=1))


def test_it_follows_from_the_seed(finished, tmp_path):
    config, result = finished
    again = run(dataclasses.replace(config, output=str(tmp_path / "again")))
    assert again.fingerprint == result.fingerprint
    other = run(dataclasses.replace(config, output=str(tmp_path / "other"), seed=1))
    assert other.fingerprint != result.fingerprint


def test_every_stored_tokenizer_can_paint(finished):
    """K-means by its centres, a projection by the patches that were stored with it."""
    config, result = finished
    painter = painting.open_painter(result.output)
    tokenizer = tokenizer_store.load(result.output)
    token_ids = torch.randint(0, 32, (3, 16))
    painted = painter.paint(token_ids)
    assert painted.shape == (3, 3, 16, 16)
    if config.model.kind == "kmeans":
        assert painter.note == painting.DECODED
        assert torch.equal(painted, tokenizer.decode(token_ids))
        return
    assert painter.note == painting.PATCHED
    patches = tokenizer_store.load_patches(result.output)
    assert torch.equal(painted[1, :, 4:8, 8:12], patches[token_ids[1, 6]])
    # The patch of a code has that code as its token.
    seen = (patches != painting.UNSEEN).flatten(1).any(1)
    assert torch.equal(tokenizer.encode(patches[seen]).flatten(), torch.arange(32)[seen])


def test_damaged_patches_are_named(finished, tmp_path):
    config, result = finished
    if config.model.kind == "kmeans":
        assert tokenizer_store.load_patches(result.output) is None
        return
    tokenizer = tokenizer_store.load(result.output)
    patches = torch.zeros(32, 3, 4, 4, dtype=torch.uint8)
    tokenizer_store.save(tokenizer, str(tmp_path), source={}, patches=patches)
    file = tmp_path / "patches.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=r"patches\.safetensors is damaged"):
        painting.open_painter(str(tmp_path))


def test_collapse_names_what_helps_this_kind(images, tmp_path):
    gate = GateConfig(min_perplexity=31.9, min_codes=1, num_images=16)
    for kind, remedy in (("kmeans", "codebook_images"), ("projection", r"model\.code_dim")):
        config = dataclasses.replace(config_for(kind, images, tmp_path / kind), gate=gate)
        with pytest.raises(StageFailed, match=f"collapsed.*{remedy}"):
            run(config)
        assert tokenizer_store.read_manifest(config.output) is None


def test_too_few_patches_are_named(images, tmp_path):
    config = replaced(config_for("kmeans", images, tmp_path / "out"), "data", codebook_images=1)
    with pytest.raises(InputError, match=r"data\.codebook_images = 1: 16 patches are too few"):
        run(config)


def test_patchwork_lays_tokens_out():
    patches = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)
    painted = painting.patchwork(torch.tensor([[0, 1, 2, 3, 3, 3]]), patches, (2, 3))
    expected = np.kron([[0, 1, 2], [3, 3, 3]], np.ones((2, 2)))
    assert np.array_equal(painted[0, 1], expected)
