"""PNG files whose texts and profiles Pillow refuses: pixels decide, and orientation is read."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from beit.images import UnusableImage, decode_array, decode_image
from tests.pipelines.image_sources import encoded, pixels

PIXELS, PNG = pixels(1), encoded(1, "PNG")


def with_chunk(png: bytes, kind: bytes, body: bytes, *, last: bool = False) -> bytes:
    """The file with one more chunk, behind the header or before the end."""
    chunk = kind + body
    whole = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = len(png) - 12 if last else 33
    return png[:at] + whole + png[at:]


LONG = zlib.compress(b"x" * 2_000_000)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/>%s</x:xmpmeta>'
TURNED = b"Raw profile type exif\0"
EXIF_6 = (
    b"\nexif\n      26\n"
    + bytes.fromhex("4d4d002a000000080001011200030000000100060000" + "00000000").hex().encode()
)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"iCCP", b"scanner\0\0" + zlib.compress(bytes(range(256)) * 8192)),
        (b"iCCP", b"scanner\0\7..."),
        (b"zTXt", b"workflow\0\0" + LONG),
        (b"zTXt", b"workflow\0\7"),
        (b"iTXt", b"prompt\0\1\0\0\0" + LONG),
        (b"tEXt", b"history\0" + b"z" * 70_000_000),
        (b"zTXt", b"exif\0\0" + zlib.compress(b"y" * 20_000_000)),
    ],
)
def test_a_png_with_long_or_broken_texts_is_sound(kind: bytes, body: bytes, last: bool) -> None:
    plain = PNG
    data = with_chunk(plain, kind, body, last=last)
    with pytest.raises((ValueError, OSError, SyntaxError)):
        Image.open(io.BytesIO(data), formats=["PNG"]).load()
    assert np.array_equal(decode_array(data), PIXELS)
    assert np.array_equal(np.asarray(decode_image(data)), PIXELS)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % b""),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP % b"")),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP % (b" " * 2_000_000))),
        (b"tEXt", TURNED + EXIF_6),
        (b"zTXt", TURNED + b"\0" + zlib.compress(EXIF_6)),
        (b"zTXt", TURNED + b"\0" + zlib.compress(EXIF_6 + b"00" * 1_000_000)),
    ],
)
def test_orientation_is_read_beside_texts_that_are_skipped(kind: bytes, body: bytes) -> None:
    turned = with_chunk(PNG, kind, body)
    data = with_chunk(turned, b"zTXt", b"workflow\0\0" + LONG)
    assert np.array_equal(decode_array(data), np.rot90(PIXELS, -1))


def test_texts_that_unpack_without_end_take_no_memory() -> None:
    """300 MB of zeros in 300 kB, where an orientation might be."""
    packed = zlib.compress(bytes(300_000_000), 9)
    plain = PNG
    data = with_chunk(plain, b"zTXt", TURNED + b"\0" + packed)
    tracemalloc.start()
    assert np.array_equal(decode_array(data), PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, peak


def test_damage_to_the_pixels_stays_damage() -> None:
    data = with_chunk(PNG, b"zTXt", b"workflow\0\0" + LONG)
    with pytest.raises(UnusableImage, match=r"truncated|corrupt"):
        decode_array(data[:-60])
    at = data.index(b"IDAT")
    with pytest.raises(UnusableImage):
        decode_array(data[: at + 10] + b"\xff\xff\xff" + data[at + 13 :])
    with pytest.raises(UnusableImage, match="too_many_pixels"):
        decode_array(data, max_pixels=10)
