"""A box of a JPEG decoded without the rest, by libjpeg-turbo's TurboJPEG interface, version 3.

The interface comes with no binding that has its cropping region, so the shared library is called by
ctypes: that of the system, or of the PyPI package `turbojpeg` (the `jpeg` extra); without either
`decode_box` says None. Errors of its decoders come back as return values: none ends the process.
Source: `turbojpeg.h` of libjpeg-turbo 3.0.
"""

import ctypes
import functools
import sys
from importlib import metadata
from typing import Final

import numpy as np

# Members of the header's enumerations.
_INIT_DECOMPRESS: Final = 1
_PIXELS_RGB: Final = 0
_SUBSAMPLING, _WIDTH, _HEIGHT, _COLOURS = 4, 5, 6, 8
_YCBCR, _GREY = 1, 2
# Width of a block of whole samples for 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0 and 4:1:1.
_BLOCK_WIDTHS: Final = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}
# Colours are smoothed over neighbouring samples: so many pixels around a box are decoded with it.
_MARGIN: Final = 16


class _Region(ctypes.Structure):
    _fields_ = tuple((side, ctypes.c_int) for side in ("x", "y", "width", "height"))


def available() -> bool:
    """Whether boxes can be decoded here."""
    return _library() is not None


def decode_box(data: bytes, rows: slice, columns: slice) -> np.ndarray | None:
    """Rows and columns of a JPEG in RGB, uint8, bit for bit as in the whole picture.

    None where the library is missing, where the file is not one of those whose boxes were seen to
    be equal (YCbCr or grey of a common subsampling), and if the decoder so much as warns. What lies
    below the box is not looked at, damage there not seen.
    """
    library = _library()
    if library is None:
        return None
    # A new one each time: tables of a file, sound or not, would be those of the next.
    handle = library.tj3Init(_INIT_DECOMPRESS)
    try:
        return _decode(library, handle, data, rows, columns) if handle else None
    finally:
        library.tj3Destroy(handle)


def _decode(
    library: ctypes.CDLL, handle: int, data: bytes, rows: slice, columns: slice
) -> np.ndarray | None:
    if library.tj3DecompressHeader(handle, data, len(data)):
        return None
    subsampling, width, height, colours = (
        library.tj3Get(handle, name) for name in (_SUBSAMPLING, _WIDTH, _HEIGHT, _COLOURS)
    )
    if colours not in (_YCBCR, _GREY) or subsampling not in _BLOCK_WIDTHS:
        return None
    if rows.stop > height or columns.stop > width:
        return None
    block = _BLOCK_WIDTHS[subsampling]
    top, left = max(0, rows.start - _MARGIN), max(0, columns.start - _MARGIN) // block * block
    bottom, right = min(height, rows.stop + _MARGIN), min(width, columns.stop + _MARGIN)
    region = _Region(left, top, right - left, bottom - top)
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    if library.tj3SetCroppingRegion(handle, region) or library.tj3Decompress8(
        handle, data, len(data), pixels.ctypes.data, 0, _PIXELS_RGB
    ):
        return None
    return pixels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The shared library, if there is one of version 3."""
    for path in _paths():
        try:
            library = ctypes.CDLL(path)
            handle, size = ctypes.c_void_p, ctypes.c_size_t
            library.tj3Init.restype = handle
            library.tj3Destroy.argtypes = [handle]
            library.tj3Destroy.restype = None
            library.tj3Get.argtypes = [handle, ctypes.c_int]
            library.tj3DecompressHeader.argtypes = [handle, ctypes.c_char_p, size]
            library.tj3SetCroppingRegion.argtypes = [handle, _Region]
            library.tj3Decompress8.argtypes = [
                handle, ctypes.c_char_p, size, handle, ctypes.c_int, ctypes.c_int
            ]  # fmt: skip
        except (OSError, AttributeError):  # not there, or of version 2
            continue
        return library
    return None


def _paths() -> list[str]:
    name = "libturbojpeg.dylib" if sys.platform == "darwin" else "libturbojpeg.so.0"
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    return [name, *(str(file.locate()) for file in files if "libturbojpeg" in file.name)]
