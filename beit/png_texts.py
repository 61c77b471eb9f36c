"""PNG files without what says nothing of their pixels.

Pillow refuses a whole file for a text or profile that is long or damaged (its bound against
decompression bombs is 1 MB). Pixels decide here, so these chunks can be left out; what tells the
orientation is kept, within a bound of our own.
"""

import struct
import zlib
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES: Final = 16 * 2**20
_TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Where Pillow looks for an orientation beside the chunk eXIf.
_ORIENTATION: Final = frozenset({b"exif", b"xmp", b"Raw profile type exif", b"XML:com.adobe.xmp"})


def without_texts(data: bytes) -> bytes | None:
    """The file without profile and texts; None if it is no PNG, or has nothing to leave out.

    Texts with an orientation are stored unpacked, if they have at most `MAX_TEXT_BYTES`.
    """
    if not data.startswith(SIGNATURE):
        return None
    pieces = [SIGNATURE]
    at = len(SIGNATURE)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if kind in _TEXTS:
            pieces.append(_orientation(kind, data[at + 8 : end - 4]))
        elif kind != b"iCCP":
            pieces.append(data[at:end])
        at = end
    plain = b"".join(pieces)
    return plain if plain != data else None


def _orientation(kind: bytes, body: bytes) -> bytes:
    """The chunk again, unpacked; nothing if it tells no orientation."""
    keyword, _, rest = body.partition(b"\0")
    text: bytes | None = None
    if keyword in _ORIENTATION and kind == b"zTXt":
        kind, text = b"tEXt", _unpacked(rest[1:])
    elif keyword in _ORIENTATION and kind == b"tEXt":
        text = rest
    elif keyword in _ORIENTATION:
        # Whether it is packed, how, and two names of languages come before the text.
        *languages, text = rest[2:].split(b"\0", 2)
        text = text if rest[:1] == b"\0" else _unpacked(text)
        keyword += b"\0\0\0" + b"\0".join(languages)
    if text is None:
        return b""
    chunk = kind + keyword + b"\0" + text
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _unpacked(packed: bytes) -> bytes | None:
    """Inflated bytes; None if they are damaged or too many."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(packed, MAX_TEXT_BYTES)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else text
