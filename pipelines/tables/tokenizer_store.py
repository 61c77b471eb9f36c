"""The tokenizer as an artefact: a directory at any URI.

`tokenizer.safetensors` and `config.json` are the tokenizer (`beit.tokenizers`); `manifest.json`,
written last, makes it exist and says where it came from. A directory of the first two files alone,
put together by hand, can be read as well. One that cannot decode has `patches.safetensors` beside
them: for each code the image patch nearest to it, for pictures; it is no part of the identity.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor
from typing_extensions import TypedDict

from beit.tokenizers import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ImageTokenizer,
    Precision,
    load_tokenizer,
    save_tokenizer,
)
from pipelines import storage
from pipelines.errors import InputError
from pipelines.records import Count, FileRecord, Pair, check_values, read_values, refuse_other_kinds

KIND = "tokenizer"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PATCHES_FILE = "patches.safetensors"
REMEDY = "train or import the tokenizer again"


class Manifest(TypedDict):
    """What must stand in the manifest of a tokenizer."""

    kind: Literal["tokenizer"]
    schema_version: Literal[1]
    fingerprint: str
    architecture: str
    vocab_size: Count
    grid_size: Pair
    image_size: Count
    source: dict[str, Any]
    scorecard: dict[str, Any] | None
    files: NotRequired[dict[str, FileRecord]]


class Description(TypedDict):
    """What must stand in the configuration of a tokenizer, whatever its architecture."""

    vocab_size: Count
    grid_size: Pair
    image_size: Count


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """What is known of a stored tokenizer without loading its weights."""

    uri: str
    config: dict[str, Any]
    """config.json: architecture, vocab_size, image_size, grid_size, stride, interpolation."""
    manifest: dict[str, Any] | None
    """Lineage and scorecard; None for a directory without manifest."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        rows, columns = self.config["grid_size"]
        return rows, columns

    @property
    def vocab_size(self) -> int:
        """Number of visual tokens."""
        return int(self.config["vocab_size"])

    @property
    def image_size(self) -> int:
        """Side of the token view in pixels."""
        return int(self.config["image_size"])


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest at `uri`, or None where no finished tokenizer is."""
    path = storage.join(uri, MANIFEST)
    try:
        manifest = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    refuse_other_kinds(manifest, path, kind=KIND, versions=(SCHEMA_VERSION,))
    check_values(manifest, Manifest, path, REMEDY)
    return dict(manifest)


def check_files(uri: str, manifest: Mapping[str, Any]) -> None:
    """Looks whether every file of the manifest is there in its size; nothing is read.

    Raises:
        InputError: one is missing or cut short.
    """
    sizes = {file.path: file.size for file in storage.list_files(uri, recursive=False)}
    for name, said in (manifest.get("files") or {}).items():  # 0.1.0 named none
        found = sizes.get(name)
        if found != said["bytes"]:
            what = "is missing" if found is None else f"has {found:,} of {said['bytes']:,} bytes"
            raise InputError(
                f"{uri}: {name} {what}: bring it back, or delete {MANIFEST} there and run the same "
                "command again"
            )


def describe(uri: str) -> TokenizerInfo:
    """Reads configuration and manifest only.

    Raises:
        InputError: there is no tokenizer at `uri`.
    """
    uri = storage.absolute(uri)
    manifest = read_manifest(uri)
    try:
        config = read_values(storage.join(uri, CONFIG_FILE), Description, REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{uri}: no tokenizer ({CONFIG_FILE} is missing); run `beit train-tokenizer` or "
            "`beit import-tokenizer` with this output"
        ) from error
    return TokenizerInfo(uri=uri, config=config, manifest=manifest)


def load(uri: str, *, device: str = "cpu", precision: Precision = "float32") -> ImageTokenizer:
    """Loads a tokenizer; a remote one passes through a temporary directory.

    Raises:
        InputError: nothing there, damaged files, or files that are not those of the manifest.
    """
    info = describe(uri)
    with _local_copy(info.uri) as directory:
        try:
            tokenizer = load_tokenizer(directory, device=device, precision=precision)
        except ValueError as error:
            message = str(error).replace(str(directory), info.uri)
            raise InputError(f"{message}; {REMEDY}") from error
    recorded = info.manifest["fingerprint"] if info.manifest else None
    if recorded not in (None, tokenizer.fingerprint()):
        raise InputError(
            f"{info.uri}: {MANIFEST} states fingerprint {recorded}, weights and configuration have "
            f"{tokenizer.fingerprint()}; the files were changed, train or import them again"
        )
    return tokenizer


def load_patches(uri: str) -> Tensor | None:
    """For each code the image patch nearest to it, uint8 (V, 3, s, s); None where none are kept.

    Raises:
        InputError: the file is damaged.
    """
    path = storage.join(storage.absolute(uri), PATCHES_FILE)
    try:
        patches: Tensor = safetensors.load(storage.read_bytes(path))["patches"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, or make it again") from error
    return patches


def save(
    tokenizer: ImageTokenizer,
    uri: str,
    *,
    source: Mapping[str, Any],
    scorecard: Mapping[str, Any] | None = None,
    patches: Tensor | None = None,
) -> dict[str, Any]:
    """Writes the tokenizer, its manifest last, and returns the manifest.

    Args:
        source: how it was made: stage, options, fingerprints or hashes of what it was made from.
        scorecard: how it does on the images it is meant for, see `pipelines.scorecard`.
        patches: uint8 (V, 3, s, s), for each code the image patch nearest to it.

    Raises:
        InputError: another tokenizer is there.
    """
    with tempfile.TemporaryDirectory() as directory:
        fingerprint = save_tokenizer(tokenizer, directory)
        names = [WEIGHTS_FILE, CONFIG_FILE]
        if patches is not None:
            safetensors.save_file({"patches": patches}, Path(directory, PATCHES_FILE))
            names.append(PATCHES_FILE)
        contents = {name: Path(directory, name).read_bytes() for name in names}
    manifest = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "architecture": tokenizer.architecture,
        "vocab_size": tokenizer.vocab_size,
        "grid_size": list(tokenizer.grid_size),
        "image_size": tokenizer.image_size,
        "source": dict(source),
        "scorecard": dict(scorecard) if scorecard else None,
        "files": {
            name: {"bytes": len(data), "hash": storage.digest(data)}
            for name, data in contents.items()
        },
    }
    path, record = storage.join(uri, MANIFEST), storage.canonical_json(manifest)
    if not storage.exists(path):  # what a finished tokenizer consists of is never written over
        for name, data in contents.items():
            storage.write_bytes(storage.join(uri, name), data)
    if not storage.created_or_equal(path, record):
        raise InputError(f"{uri}: holds another tokenizer; give another output")
    return manifest


@contextlib.contextmanager
def _local_copy(uri: str) -> Iterator[Path]:
    if storage.is_local(uri):
        yield Path(storage.absolute(uri))
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with contextlib.suppress(FileNotFoundError):  # load_tokenizer names what is missing
                Path(directory, name).write_bytes(storage.read_bytes(storage.join(uri, name)))
        yield Path(directory)
