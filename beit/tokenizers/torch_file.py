"""Tensors of a PyTorch file (both formats of torch.save, or safetensors), nothing executed.

    zip (torch >= 1.6)     archive/data.pkl, archive/data/KEY (raw storages)
    legacy (before)        pickles of magic number, protocol, system; of the object; of the list of
                           storage keys; then per storage its length (int64) and raw data

Layouts read from torch/serialization.py.
"""

import io
import json
import struct
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from beit.tokenizers.pickle_reader import Name, UnsafePickleError, read_pickle, tensors_of
from beit.tokenizers.stored_tensor import STORAGE_TYPES, Storage, StoredTensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], str]:
    """All named tensors of a file and its format: "zip", "legacy" or "safetensors".

    A whole pickled network gives its state dict. Raises `UnsafePickleError` (a ValueError) for
    anything else, saying what was found.
    """
    if data[:4] == b"PK\x03\x04":
        return _materialised(_read_zip(data)), "zip"
    if data[:1] == b"\x80":
        return _materialised(_read_legacy(data)), "legacy"
    if _looks_like_safetensors(data):
        try:
            return load_safetensors(data), "safetensors"
        except SafetensorError as error:
            raise UnsafePickleError(f"damaged safetensors file: {error}") from error
    raise UnsafePickleError(
        "neither a torch.save file nor safetensors: " + _what_it_looks_like(data)
    )


def _materialised(value: Any) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in tensors_of(value).items()}


def _looks_like_safetensors(data: bytes) -> bool:
    if len(data) < 10:
        return False
    (length,) = struct.unpack("<Q", data[:8])
    if not 2 <= length <= len(data) - 8:
        return False
    try:
        return isinstance(json.loads(data[8 : 8 + length]), dict)
    except ValueError:
        return False


def _what_it_looks_like(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return "the file is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably an error message of the server"
    if data[257:262] == b"ustar":
        return "it is a tar archive (torch before 0.1.10): save it again with a newer torch"
    return f"it begins with {data[:8]!r}"


# The zip format


def _read_zip(data: bytes) -> Any:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, struct.error, OSError, NotImplementedError) as error:
        raise UnsafePickleError(f"damaged zip archive: {error}") from error
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsafePickleError("a zip archive, but not of torch.save: it has no single data.pkl")
    root = pickles[0].partition("/")[0]
    if f"{root}/constants.pkl" in names:
        raise UnsafePickleError(
            "a TorchScript archive holds code: save the network's state dict instead"
        )
    if f"{root}/byteorder" in names and _entry(archive, f"{root}/byteorder") != b"little":
        raise UnsafePickleError("big-endian file: save it again on a little-endian machine")
    storages: dict[str, Storage] = {}

    def persistent_load(reference: Any) -> Any:
        storage = _storage_of(reference, num_fields=5, known=storages)
        if storage.data is None:
            storage.data = _entry(archive, f"{root}/data/{storage.key}")
            _check_length(storage, len(storage.data))
        return StoredTensor(storage, 0, (storage.numel,), (1,))

    return read_pickle(io.BytesIO(_entry(archive, pickles[0])), persistent_load)


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.NameToInfo.get(name)
    if info is None:
        raise UnsafePickleError(f"damaged zip archive: {name} is missing")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UnsafePickleError(f"{name} is compressed or encrypted: torch.save stores plainly")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error, OSError, RuntimeError) as error:
        raise UnsafePickleError(f"damaged zip archive: {name}: {error}") from error


# The legacy format


def _read_legacy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    if read_pickle(stream) != LEGACY_MAGIC:
        raise UnsafePickleError("a pickle, but not of torch.save: it has no magic number")
    if read_pickle(stream) != LEGACY_PROTOCOL:
        raise UnsafePickleError("a torch.save file of an unknown protocol")
    system = read_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsafePickleError("big-endian file: save it again on a little-endian machine")
    storages: dict[str, Storage] = {}

    def persistent_load(reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            # (module, class, source file, source text): torch kept the text to warn of changes.
            if not isinstance(reference[1], Name):
                raise UnsafePickleError("malformed pickle: a class without name")
            return reference[1]
        storage = _storage_of(reference, num_fields=6, known=storages)
        if reference[5] is not None:
            raise UnsafePickleError("views of storages (torch before 0.4) are not read")
        return StoredTensor(storage, 0, (storage.numel,), (1,))

    value = read_pickle(stream, persistent_load)
    keys = read_pickle(stream)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(storages):
        raise UnsafePickleError("the list of storages does not match those that tensors refer to")
    for key in keys:
        storage = storages[key]
        length = stream.read(8)
        if len(length) < 8:
            raise UnsafePickleError("the file is cut off")
        (numel,) = struct.unpack("<q", length)
        if numel != storage.numel:
            raise UnsafePickleError(
                f"storage {key!r} has {numel} elements, {storage.numel} are expected"
            )
        storage.data = stream.read(storage.num_bytes)
        _check_length(storage, len(storage.data))
    return value


# Both


def _storage_of(reference: Any, *, num_fields: int, known: dict[str, Storage]) -> Storage:
    """(storage, type, key, location, elements, ...) -> the storage, one for each key."""
    if (
        not isinstance(reference, tuple)
        or len(reference) != num_fields
        or reference[0] != "storage"
        or not isinstance(reference[1], Name)
        or reference[1].name not in STORAGE_TYPES
        or not isinstance(reference[2], str)
        or type(reference[4]) is not int
        or reference[4] < 0
    ):
        raise UnsafePickleError("malformed pickle: a reference that is no storage")
    _, kind, key, _, numel = reference[:5]
    storage = known.setdefault(key, Storage(key, STORAGE_TYPES[kind.name], numel))
    if (storage.dtype, storage.numel) != (STORAGE_TYPES[kind.name], numel):
        raise UnsafePickleError(f"malformed pickle: storage {key!r} is described in two ways")
    return storage


def _check_length(storage: Storage, length: int) -> None:
    if length != storage.num_bytes:
        raise UnsafePickleError(
            f"storage {storage.key!r} has {length} bytes, {storage.num_bytes} are expected: "
            "the file is cut off or damaged"
        )


def assert_finite(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite")
