"""Tensors of a PyTorch file (both formats of torch.save, or safetensors), nothing executed.

    zip (torch >= 1.6)     archive/data.pkl, archive/data/KEY (raw storages)
    legacy (before)        pickles of magic number, protocol, system; of the object; of the list of
                           storage keys; then per storage its length (int64) and raw data

Layouts read from torch/serialization.py.
"""

import io
import struct
import zipfile
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from beit.git_lfs import REMEDY, is_pointer
from beit.tensor_files import check_header
from beit.tokenizers.pickle_reader import (
    StoredTensor,
    UnsafePickleError,
    read_pickle,
    tensors_of,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], str]:
    """All named tensors of a file and its format: "zip", "legacy" or "safetensors".

    A whole pickled network gives its state dict. Raises `UnsafePickleError` (a ValueError) for
    anything else, saying what was found.
    """
    if data[:4] == b"PK\x03\x04":
        return _copied(_read_zip(data), len(data)), "zip"
    if data[:1] == b"\x80" and not _looks_like_safetensors(data):
        return _copied(_read_legacy(data), len(data)), "legacy"
    if _looks_like_safetensors(data):
        try:
            check_header(data[:8], "the file")
            return load_safetensors(data), "safetensors"
        except Exception as error:  # its own, undocumented, types
            raise UnsafePickleError(f"damaged safetensors file: {error}") from error
    raise UnsafePickleError(
        "neither a torch.save file nor safetensors: " + _what_it_looks_like(data)
    )


def _copied(value: Any, num_bytes: int) -> dict[str, Tensor]:
    """Tensors with memory of their own; a file may show one storage many times, but not more."""
    tensors = tensors_of(value)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > 2 * num_bytes:
        raise UnsafePickleError(f"tensors of {total} bytes in a file of {num_bytes}")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _looks_like_safetensors(data: bytes) -> bool:
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    return 2 <= length <= len(data) - 8 and data[8:9] == b"{"


def _what_it_looks_like(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return "the file is empty"
    if is_pointer(data):
        return f"it and others may be {REMEDY}"
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
    storages = _Storages(len(data))

    def persistent_load(reference: Any) -> StoredTensor:
        key, is_new = storages.refer(reference, num_fields=5)
        if is_new:
            storages.fill(key, _entry(archive, f"{root}/data/{key}"))
        return storages.by_key[key]

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
    storages = _Storages(len(data))

    def persistent_load(reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            # (module, class, source file, source text): torch kept the text to warn of changes.
            return reference[1]
        key, _ = storages.refer(reference, num_fields=6)
        if reference[5] is not None:
            raise UnsafePickleError("views of storages (torch before 0.4) are not read")
        return storages.by_key[key]

    value = read_pickle(stream, persistent_load)
    keys = read_pickle(stream)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(storages.by_key):
        raise UnsafePickleError("the list of storages does not match those that tensors refer to")
    for key in keys:
        length = stream.read(8)
        if len(length) < 8:
            raise UnsafePickleError("the file is cut off")
        (numel,) = struct.unpack("<q", length)
        flat = storages.by_key[key].value
        if numel != flat.numel():
            raise UnsafePickleError(
                f"storage {key!r} has {numel} elements, {flat.numel()} are expected"
            )
        storages.fill(key, stream.read(flat.nbytes))
    return value


class _Storages:
    """The file's storages as flat tensors, from the time when the pickle first names them."""

    def __init__(self, num_bytes: int) -> None:
        self.by_key: dict[str, StoredTensor] = {}
        self._left = num_bytes

    def refer(self, reference: Any, *, num_fields: int) -> tuple[str, bool]:
        """(storage, type, key, location, elements, ...) to the key, and whether it is new."""
        if (
            not isinstance(reference, tuple)
            or len(reference) != num_fields
            or reference[0] != "storage"
            or not isinstance(reference[1], torch.dtype)
            or not isinstance(reference[2], str)
            or type(reference[4]) is not int
            or reference[4] < 0
        ):
            raise UnsafePickleError("malformed pickle: a reference that is no storage")
        _, dtype, key, _, numel = reference[:5]
        known = self.by_key.get(key)
        if known is not None:
            if (known.value.dtype, known.value.numel()) != (dtype, numel):
                raise UnsafePickleError(f"storage {key!r} is described in two ways")
            return key, False
        self._left -= numel * dtype.itemsize
        if self._left < 0:
            raise UnsafePickleError(f"storage {key!r} is larger than the file")
        self.by_key[key] = StoredTensor(torch.empty(numel, dtype=dtype))
        return key, True

    def fill(self, key: str, data: bytes) -> None:
        """Puts the file's bytes into a storage. Raises UnsafePickleError if they do not fit."""
        flat = self.by_key[key].value
        if len(data) != flat.nbytes:
            raise UnsafePickleError(
                f"storage {key!r} has {len(data)} bytes, {flat.nbytes} are expected: the file is "
                "cut off or damaged"
            )
        if data:
            flat.copy_(torch.frombuffer(bytearray(data), dtype=flat.dtype))


def assert_finite(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite")
