"""Importing published tokenizers: every layout gives the same tokenizer, nothing is executed."""

import dataclasses
import hashlib
import io
import os
import sys

import pytest
import torch
from safetensors.torch import save as save_safetensors

from beit.tokenizers.discrete_vae import map_pixels
from pipelines import storage
from pipelines.config.import_tokenizer import ImportTokenizerConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.import_tokenizer import run
from pipelines.tables import tokenizer_store
from tests.beit.dalle_package import dall_e
from tests.beit.test_dalle import flava_key
from tests.pipelines.tokenizer_fixtures import disc, image_table


def saved(value, *, legacy=False):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files as they are published, and what the original networks compute."""
    directory = tmp_path_factory.mktemp("published")
    with dall_e(directory) as (Encoder, Decoder):
        torch.manual_seed(0)
        encoder = Encoder(n_hid=8, vocab_size=64).eval()
        decoder = Decoder(n_init=4, n_hid=8, vocab_size=64).eval()
        for legacy, name in ((True, "old"), (False, "new")):
            (directory / f"{name}-encoder.pkl").write_bytes(saved(encoder, legacy=legacy))
            (directory / f"{name}-decoder.pkl").write_bytes(saved(decoder, legacy=legacy))
        state = encoder.state_dict()
        flava = {flava_key(name): tensor for name, tensor in state.items()}
        whole = {"text_model.ids": torch.arange(3)} | {
            f"image_codebook.{name}": tensor for name, tensor in flava.items()
        }
        for name, data in {
            "state.pth": saved({"state_dict": state}),
            "flava.safetensors": save_safetensors(flava),
            "whole-flava.bin": saved(whole),
        }.items():
            (directory / name).write_bytes(data)
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            token_ids = encoder(map_pixels(images)).argmax(1)
            one_hot = torch.nn.functional.one_hot(token_ids, 64).movedim(-1, 1).float()
            outputs = decoder(one_hot)
    return directory, images, token_ids.flatten(1), outputs


def settings(directory, source, output, **changes):
    return ImportTokenizerConfig(
        source=str(directory / source),
        output=str(output),
        image_size=32,
        tracking=TrackingConfig(enabled=False),
        **changes,
    )


SOURCES = [
    "old-encoder.pkl",
    "new-encoder.pkl",
    "state.pth",
    "flava.safetensors",
    "whole-flava.bin",
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_layout_gives_the_same_tokens(published, tmp_path, source, capsys):
    directory, images, token_ids, _ = published
    assert "dall_e" not in sys.modules
    result = run(settings(directory, source, tmp_path / "out"))
    tokenizer = tokenizer_store.load(result.output)
    assert torch.equal(tokenizer.encode(images), token_ids)
    assert tokenizer.decoder is None
    assert (result.vocab_size, result.grid_size) == (64, (4, 4))
    digest = hashlib.sha256((directory / source).read_bytes()).hexdigest()
    assert digest in capsys.readouterr().err  # printed,
    assert digest in result.summary()
    assert "\n" not in result.summary()
    manifest = tokenizer_store.read_manifest(result.output)
    assert manifest["source"]["files"][0]["sha256"] == digest  # and recorded
    assert "dall_e" not in sys.modules
    # The weights are the same whatever file they came from.
    first = run(settings(directory, SOURCES[0], tmp_path / "first"))
    assert first.fingerprint == result.fingerprint


@pytest.mark.parametrize("age", ["old", "new"])
def test_the_decoder(published, tmp_path, age):
    directory, _, token_ids, outputs = published
    config = settings(
        directory,
        f"{age}-encoder.pkl",
        tmp_path / "out",
        decoder=str(directory / f"{age}-decoder.pkl"),
    )
    tokenizer = tokenizer_store.load(run(config).output)
    one_hot = torch.nn.functional.one_hot(token_ids.view(3, 4, 4), 64).movedim(-1, 1).float()
    torch.testing.assert_close(tokenizer.decoder(one_hot), outputs, atol=1e-6, rtol=0)
    assert tokenizer.decode(token_ids).shape == (3, 3, 32, 32)


def test_again_and_into_another(published, tmp_path):
    directory, *_ = published
    config = settings(directory, "old-encoder.pkl", tmp_path / "out")
    first = run(config)
    again = run(config)
    assert not first.already_done
    assert again.already_done
    assert "already imported" in again.summary()
    with pytest.raises(InputError, match="holds another tokenizer"):
        run(dataclasses.replace(config, source=str(directory / "new-encoder.pkl")))
    with pytest.raises(InputError, match="holds another tokenizer"):
        run(dataclasses.replace(config, image_size=64))
    with pytest.raises(InputError, match=r"image_size 100 is not a multiple of .* 8: choose 96"):
        run(dataclasses.replace(config, image_size=100))


def test_demanded_hashes(published, tmp_path):
    directory, *_ = published
    digest = hashlib.sha256((directory / "old-encoder.pkl").read_bytes()).hexdigest()
    config = settings(directory, "old-encoder.pkl", tmp_path / "out")
    with pytest.raises(InputError, match=f"SHA-256 is {digest}, source_sha256 demands {'0' * 64}"):
        run(dataclasses.replace(config, source_sha256="0" * 64))
    assert run(dataclasses.replace(config, source_sha256=digest.upper())).fingerprint


def test_scored_on_images(published, tmp_path):
    directory, *_ = published
    images = image_table(str(tmp_path / "images"), [disc(seed, size=40) for seed in range(30)])
    config = settings(
        directory,
        "new-encoder.pkl",
        tmp_path / "out",
        decoder=str(directory / "new-decoder.pkl"),
        images=images.uri,
        num_images=20,
    )
    result = run(config)
    assert result.scorecard["num_images"] == 20
    assert result.scorecard["mse"] > 0
    assert "perplexity" in result.summary()
    assert tokenizer_store.read_manifest(result.output)["scorecard"] == result.scorecard


class Call:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_poisoned_encoder(published, tmp_path, legacy):
    """The network is genuine, with one more attribute."""
    directory, *_ = published
    canary = tmp_path / "canary"
    with dall_e(directory) as (Encoder, _):
        network = Encoder(n_hid=8, vocab_size=64)
        network.blocks.group_3.block_2.note = Call(f"touch {canary}")
        data = saved(network, legacy=legacy)
    (tmp_path / "encoder.pkl").write_bytes(data)
    config = settings(tmp_path, "encoder.pkl", tmp_path / "out")
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(InputError, match=rf"encoder\.pkl \(SHA-256 {digest}\): .*posix\.system"):
        run(config)
    assert not canary.exists()
    assert not storage.exists(config.output)


def test_wrong_files_are_named(published, tmp_path):
    directory, *_ = published
    output = tmp_path / "out"

    def refused(message, source, **changes):
        with pytest.raises(InputError, match=message):
            run(settings(directory, source, output, **changes))
        assert not output.exists()

    refused("no such file", "nowhere.pkl")
    refused("it holds a decoder, not an encoder", "old-decoder.pkl")
    refused(
        "it holds an encoder, not a decoder",
        "old-encoder.pkl",
        decoder=str(directory / "old-encoder.pkl"),
    )
    (directory / "page.pkl").write_bytes(b"<!DOCTYPE html><title>403</title>")
    refused("web page", "page.pkl")
    (directory / "other.pth").write_bytes(saved({"fc.weight": torch.ones(2, 2)}))
    refused(r"blocks\.input.* found fc\.w", "other.pth")
    state = {k: v.clone() for k, v in torch.load(directory / "state.pth")["state_dict"].items()}
    short = {k: v for k, v in state.items() if k != "blocks.group_2.block_1.id_path.w"}
    (directory / "short.pth").write_bytes(saved(short))
    refused(r"Missing key.*group_2\.block_1\.id_path\.w", "short.pth")
    (directory / "more.pth").write_bytes(saved({**state, "blocks.extra.w": torch.ones(1)}))
    refused(r"Unexpected key.*blocks\.extra\.w", "more.pth")
    shape = {**state, "blocks.group_4.block_1.id_path.b": torch.ones(3)}
    (directory / "shape.pth").write_bytes(saved(shape))
    refused(r"size mismatch for blocks\.group_4\.block_1\.id_path\.b", "shape.pth")
    poisoned = {**state, "blocks.input.b": state["blocks.input.b"] * float("nan")}
    (directory / "nan.pth").write_bytes(saved(poisoned))
    refused(r"blocks\.input\.b holds values that are not finite", "nan.pth")
    with dall_e(directory) as (_, Decoder):
        data = saved(Decoder(n_init=4, n_hid=8, vocab_size=32))
    (directory / "small-decoder.pkl").write_bytes(data)
    refused(
        "64 codes, the decoder 32",
        "new-encoder.pkl",
        decoder=str(directory / "small-decoder.pkl"),
    )
    with pytest.raises(InputError, match="download the file first"):
        run(dataclasses.replace(
            settings(directory, "x", output), source="https://cdn.openai.com/dall-e/encoder.pkl"
        ))  # fmt: skip


def test_bad_settings_are_named():
    for empty in ("source", "output"):
        config = ImportTokenizerConfig(**{"source": "a", "output": "b", empty: ""})
        with pytest.raises(InputError, match=f"{empty} = '': give a path or URI"):
            run(config)
    for changes, message in (
        ({"image_size": 4}, "image_size = 4"),
        ({"num_images": 0}, "num_images = 0"),
        ({"source_sha256": "abc"}, "source_sha256 = 'abc'"),
        ({"decoder_sha256": "0" * 64}, "set decoder as well"),
    ):
        with pytest.raises(InputError, match=message):
            ImportTokenizerConfig(source="a", output="b", **changes)
