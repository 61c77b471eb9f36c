"""Weights of which a clone without Git LFS has only pointers: the remedy is said."""

from pathlib import Path

import pytest

from beit import tokenizers, weights
from beit.foreign import load_network
from beit.git_lfs import is_pointer
from beit.mim import BeitMIM
from beit.tokenizers.torch_file import read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 146946961\n" % 7
PULL = r"run `git lfs pull`"


def test_a_pointer_is_short_and_begins_with_its_version() -> None:
    assert is_pointer(POINTER)
    assert not is_pointer(POINTER + bytes(2000))
    assert not is_pointer(b"")


@pytest.mark.parametrize("name", [weights.CONFIG_FILE, weights.WEIGHTS_FILE])
def test_weights_that_were_not_fetched(tmp_path: Path, name: str) -> None:
    model = BeitMIM(
        image_size=16, patch_size=4, dim=8, depth=1, num_heads=2, vocab_size=8,
        absolute_positions=True, relative_positions="none", layer_scale_init=None,
    )  # fmt: skip
    weights.save_weights(model, tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} .*{PULL}"):
        weights.load_weights(tmp_path)


@pytest.mark.parametrize("name", [tokenizers.CONFIG_FILE, tokenizers.WEIGHTS_FILE])
def test_a_tokenizer_that_was_not_fetched(tmp_path: Path, name: str) -> None:
    for file in (tokenizers.CONFIG_FILE, tokenizers.WEIGHTS_FILE):
        (tmp_path / file).write_bytes(POINTER if file == name else b"{}")
    with pytest.raises(ValueError, match=rf"{name} .*{PULL}"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["beit.pth", "model.safetensors"])
def test_weights_of_others_that_were_not_fetched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=PULL):
        load_network(tmp_path / name)
    with pytest.raises(ValueError, match=PULL):
        read_tensors(POINTER)
