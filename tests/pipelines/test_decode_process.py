"""Decoding in another process: the same verdicts, and nothing that an image can break."""

import io
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit.images import image_digest
from pipelines.preparation import decode_process
from pipelines.preparation.decode_process import Decoded, DecodeProcess, Refused, Rules, examine
from tests.pipelines.image_sources import (
    CRASH_MARK,
    HANG_MARK,
    MEMORY_MARK,
    encoded,
    pixels,
    saved,
)

FRAGILE = "tests.pipelines.image_sources:fragile_decode"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs to wait for neighbours here."""
    monkeypatch.setattr(decode_process, "PAUSES", (0.01, 0.02))


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    rules = Rules(max_pixels=10**6, decoder=FRAGILE)
    with DecodeProcess(rules, timeout=60) as running:
        yield running


def test_the_child_decides_as_we_would(process: DecodeProcess) -> None:
    for data in [
        encoded(1),
        encoded(2, "PNG", height=1, width=1),
        encoded(3, height=700, width=1000),
        b"",
        b"hello",
        encoded(4)[:300],
        encoded(5, "PNG", height=1001, width=1000),
    ]:
        assert process.examine(data) == examine(data, process.rules)


def test_an_accepted_image_keeps_its_bytes(process: DecodeProcess) -> None:
    data = encoded(6, height=30, width=50)
    found = process.examine(data)
    assert found == Decoded(image=data, height=30, width=50, digest=image_digest(data))


def test_an_image_that_kills_its_decoder_is_found(process: DecodeProcess) -> None:
    deaths = process.deaths
    bad = encoded(7) + CRASH_MARK
    assert isinstance(process.examine(encoded(7)), Decoded)
    refused = process.examine(bad)
    assert isinstance(refused, Refused) and refused.reason == "decoder_crash"
    assert process.deaths == deaths + 3
    assert isinstance(process.examine(encoded(7)), Decoded)


def test_an_image_that_hangs_its_decoder_is_found() -> None:
    with DecodeProcess(Rules(max_pixels=10**6, decoder=FRAGILE), timeout=60) as process:
        assert isinstance(process.examine(encoded(8)), Decoded)
        process.timeout = 1.0
        refused = process.examine(encoded(8) + HANG_MARK)
        assert isinstance(refused, Refused) and refused.reason == "decoder_timeout"


def test_memory_that_lacked_is_asked_for_again(
    process: DecodeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    tries = tmp_path / "tries"
    tries.write_bytes(b"")
    data = encoded(7) + MEMORY_MARK + str(tries).encode()
    assert isinstance(process.examine(data), Decoded)
    assert [wait for wait in waits if wait] == [0.01, 0.02], "it pauses, longer each time"
    monkeypatch.setattr(decode_process, "PAUSES", ())
    tries.write_bytes(b"")
    refused = process.examine(data)
    assert isinstance(refused, Refused) and refused.reason == "out_of_memory"


def test_a_child_that_is_killed_costs_nothing(process: DecodeProcess) -> None:
    assert isinstance(process.examine(encoded(9)), Decoded)
    assert process.child is not None
    os.kill(process.child.pid, signal.SIGKILL)
    assert isinstance(process.examine(encoded(9)), Decoded)


def test_the_child_ends_with_its_input(process: DecodeProcess) -> None:
    """So it does not outlive a parent that was killed."""
    own = DecodeProcess(process.rules, timeout=60)
    own.examine(encoded(10))
    assert own.child is not None and own.connection is not None
    own.connection.close()
    assert own.child.wait(timeout=60) == 0
    own.close()


def test_long_sides_are_shrunk_once(process: DecodeProcess) -> None:
    rules = Rules(max_pixels=10**6, max_side=100, quality=90)
    with DecodeProcess(rules, timeout=60) as shrinking:
        large, small = encoded(11, "PNG", height=150, width=400), encoded(12, height=60, width=100)
        found = shrinking.examine(large)
        assert isinstance(found, Decoded)
        assert (found.height, found.width) == (38, 100)
        assert found.digest == image_digest(found.image)
        with Image.open(io.BytesIO(found.image)) as image:
            assert (image.format, image.size) == ("JPEG", (100, 38))
            shrunk = np.asarray(image, dtype=float)
        wanted = Image.fromarray(pixels(11, 150, 400)).resize((100, 38), Image.Resampling.LANCZOS)
        assert np.abs(shrunk - np.asarray(wanted, dtype=float)).mean() < 4
        assert shrinking.examine(large) == found
        untouched = shrinking.examine(small)
        assert isinstance(untouched, Decoded) and untouched.image == small


def test_a_rotated_image_is_shrunk_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(pixels(13, 120, 200)), "JPEG", exif=exif)
    found = examine(data, Rules(max_pixels=10**6, max_side=50))
    assert isinstance(found, Decoded)
    assert (found.height, found.width) == (50, 30)
    with Image.open(io.BytesIO(found.image)) as image:
        assert image.size == (30, 50)
        assert image.getexif().get(0x0112) is None


def test_pixels_of_a_png_have_their_checksum() -> None:
    """Pillow reads them all the same."""
    data, rules = encoded(15, "PNG"), Rules(max_pixels=10**6)
    assert isinstance(examine(data, rules), Decoded)
    at = data.index(b"IDAT") + 4 + int.from_bytes(data[data.index(b"IDAT") - 4 :][:4], "big")
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with Image.open(io.BytesIO(damaged)) as image:
        image.load()
    refused = examine(damaged, rules)
    assert isinstance(refused, Refused) and refused.reason == "corrupt"
    assert isinstance(examine(data + damaged, rules), Decoded)  # what follows the end is no image


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("left", [1, 4, 7])
def test_a_png_has_all_of_its_rows(interlaced: int, left: int) -> None:
    """Pillow fills those that are missing with black."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    def png(rows: int) -> bytes:
        # 8 x 8 grey pixels; interlaced they come in 7 passes, of 15 rows.
        passes = [1, 1, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8]
        widths = passes if interlaced else [8] * 8
        data = b"".join(b"\0" + b"\xff" * width for width in widths[: len(widths) - 8 + rows])
        header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, interlaced)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            chunk(*one)
            for one in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
        )

    assert isinstance(examine(png(8), Rules(max_pixels=64)), Decoded)
    refused = examine(png(left), Rules(max_pixels=64))
    assert isinstance(refused, Refused) and refused.reason == "truncated"


def test_a_lower_bound_on_the_sides() -> None:
    data = encoded(14, height=20, width=90)
    assert isinstance(examine(data, Rules(max_pixels=10**6, min_side=20)), Decoded)
    refused = examine(data, Rules(max_pixels=10**6, min_side=21))
    assert refused == Refused(reason="too_small", detail="90x20")
    wide = encoded(14, height=30, width=400)
    assert isinstance(examine(wide, Rules(max_pixels=10**6, min_side=30)), Decoded)
    # It would be stored with 100 x 8 pixels.
    refused = examine(wide, Rules(max_pixels=10**6, min_side=30, max_side=100))
    assert isinstance(refused, Refused) and refused.reason == "too_small"
