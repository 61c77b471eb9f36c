"""Tensors of a safetensors file, and one ValueError for whatever is wrong with it."""

import struct
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from beit.git_lfs import check_fetched

# Parsed, 90 MB of JSON are gigabytes; the largest networks need a tenth of this.
MAX_HEADER = 10_000_000


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file.

    Raises:
        ValueError: it is no whole safetensors file; names it.
    """
    check_fetched(path)
    with path.open("rb") as file:
        check_header(file.read(8), str(path))
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises its own, undocumented, types
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors


def check_header(start: bytes, name: str) -> None:
    """Raises ValueError if the file that begins with these 8 bytes claims too large a header."""
    (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
    if length > MAX_HEADER:
        raise ValueError(
            f"{name}: a safetensors header of {length} bytes: weights need no more than "
            f"{MAX_HEADER}"
        )
