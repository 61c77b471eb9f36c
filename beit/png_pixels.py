"""Whether the pixel data of a PNG are what was written, and all of it.

Each chunk of a PNG ends with a CRC-32. Pillow compares those of all chunks but IDAT, the pixels;
and the checksum inside their zlib stream lies behind the last row, where it stops to read. Where
that stream ends before, it leaves the other rows as it found them: black, or of the first colour.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from beit.png_texts import SIGNATURE

# Samples of a pixel by colour type; first column and row of each interlaced pass, and its steps.
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip
_PIECE: Final = 2**20


def has_damaged_pixels(data: bytes) -> bool:
    """Whether an IDAT chunk has another checksum than its bytes; False for what is no PNG."""
    return any(
        zlib.crc32(chunk) != int.from_bytes(crc, "big")
        for chunk, crc in _chunks(data)
        if bytes(chunk[:4]) == b"IDAT"
    )


def lacks_rows(data: bytes, pixels: np.ndarray) -> bool:
    """Whether the pixel data of a PNG that decoded end before its last row.

    `pixels` (height, width, 3), upright: unless an edge of them is of one colour, all is there, and
    nothing is unpacked to see that.
    """
    if not data.startswith(SIGNATURE):
        return False
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    if not (interlaced or any((edge == edge[0]).all() for edge in edges)):
        return False
    missing = 0
    for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-max(0, width - left) // right), -(-max(0, height - top) // down)
        row = 1 + (columns * _SAMPLES[colour] * depth + 7) // 8
        missing += rows * row if columns else 0
    stream = zlib.decompressobj()
    for chunk, _ in _chunks(data):
        piece = bytes(chunk[4:]) if bytes(chunk[:4]) == b"IDAT" else b""
        while piece and missing > 0:
            missing -= len(stream.decompress(piece, _PIECE))
            piece = stream.unconsumed_tail
    return missing > 0


def _chunks(data: bytes) -> Iterator[tuple[memoryview, memoryview]]:
    """Chunks of a PNG up to its end: kind and content, and their checksum."""
    at = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    view = memoryview(data)
    while at < len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        if bytes(view[at + 4 : at + 8]) == b"IEND":
            return
        yield view[at + 4 : end], view[end : end + 4]
        at = end + 4
