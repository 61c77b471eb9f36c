"""Tokenizer directories at any URI."""

import json
import uuid

import pytest
import torch

from beit.tokenizers import DvaeTokenizer, save_tokenizer
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return DvaeTokenizer(image_size=16, patch_size=4, dim=16, vocab_size=32)


@pytest.fixture(params=["local", "memory"])
def uri(request, tmp_path):
    """A local directory, and an object store without renames (fsspec's in memory)."""
    if request.param == "local":
        return str(tmp_path / "tokenizer")
    return f"memory://bucket-{uuid.uuid4().hex[:8]}/tokenizer"


def test_round_trip(tokenizer, uri):
    manifest = tokenizer_store.save(
        tokenizer, uri, source={"stage": "test"}, scorecard={"perplexity": 3.5}
    )
    assert manifest == tokenizer_store.read_manifest(uri)
    assert manifest["fingerprint"] == tokenizer.fingerprint()
    assert manifest["source"] == {"stage": "test"}
    for name, entry in manifest["files"].items():
        data = storage.read_bytes(storage.join(uri, name))
        assert (len(data), storage.digest(data)) == (entry["bytes"], entry["hash"])
    loaded = tokenizer_store.load(uri)
    assert loaded.fingerprint() == manifest["fingerprint"]
    info = tokenizer_store.describe(uri)
    assert (info.vocab_size, info.grid_size, info.image_size) == (32, (4, 4), 16)
    # Saved again, the same bytes: nothing depends on when or where.
    assert tokenizer_store.save(
        loaded, uri, source={"stage": "test"}, scorecard={"perplexity": 3.5}
    ) == manifest  # fmt: skip


def test_without_manifest(tokenizer, tmp_path):
    """Two files copied by hand are a tokenizer for whoever reads it, but not a finished stage."""
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_store.read_manifest(str(tmp_path)) is None
    assert tokenizer_store.load(str(tmp_path)).fingerprint() == tokenizer.fingerprint()
    assert tokenizer_store.describe(str(tmp_path)).manifest is None


def test_what_is_wrong_is_named(tokenizer, uri):
    with pytest.raises(InputError, match="train-tokenizer"):
        tokenizer_store.load(uri)
    tokenizer_store.save(tokenizer, uri, source={})
    weights = storage.join(uri, "tokenizer.safetensors")
    data = storage.read_bytes(weights)

    manifest = tokenizer_store.read_manifest(uri)
    tokenizer_store.check_files(uri, manifest)
    storage.write_bytes(weights, data[:-4])
    with pytest.raises(InputError, match=r"tokenizer\.safetensors has .* of .* bytes"):
        tokenizer_store.check_files(uri, manifest)
    with pytest.raises(InputError, match=r"tokenizer\.safetensors") as caught:
        tokenizer_store.load(uri)
    assert uri in str(caught.value)

    storage.delete(weights)
    with pytest.raises(InputError, match=r"tokenizer\.safetensors is missing: bring it back"):
        tokenizer_store.check_files(uri, manifest)
    with pytest.raises(InputError, match=r"tokenizer\.safetensors is missing"):
        tokenizer_store.load(uri)

    # Other weights under the same manifest.
    storage.write_bytes(weights, data[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="the files were changed"):
        tokenizer_store.load(uri)


def test_another_artefact_is_refused(tokenizer, tmp_path):
    uri = str(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "image_table"}))
    with pytest.raises(InputError, match="'image_table', not 'tokenizer'"):
        tokenizer_store.load(uri)
    with pytest.raises(InputError, match="holds another tokenizer"):
        tokenizer_store.save(tokenizer, uri, source={})
    assert [file.path for file in storage.list_files(uri)] == ["manifest.json"]
    storage.delete(storage.join(uri, "manifest.json"))
    manifest = tokenizer_store.save(tokenizer, uri, source={})
    storage.write_json(storage.join(uri, "manifest.json"), {**manifest, "schema_version": 9})
    with pytest.raises(InputError, match="schema_version 9"):
        tokenizer_store.describe(uri)
