"""Whether the pixel data of a PNG are what was written.

Each chunk of a PNG ends with a CRC-32. Pillow compares those of all chunks but IDAT, the pixels;
and the checksum inside their zlib stream lies behind the last row, where it stops to read.
"""

import zlib
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def has_damaged_pixels(data: bytes) -> bool:
    """Whether an IDAT chunk has another checksum than its bytes; False for what is no PNG."""
    at = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    view = memoryview(data)
    while at < len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            return True
        if kind == b"IEND":
            break
        at = end + 4
    return False
