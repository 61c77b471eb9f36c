"""One rule of normalisation, and no exception but UnusableImage on any bytes."""

import contextlib
import io
import random
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from beit import images
from beit.images import UnusableImage, decode_array, decode_image, image_digest


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    """A smooth colourful picture with some noise, different in all four corners."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + 2 * y) % 256], axis=-1)
    return Image.fromarray(np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.info == {}
    array = decode_array(data)
    np.testing.assert_array_equal(array, np.asarray(image))
    assert array.flags.writeable
    assert array.flags.c_contiguous
    return array


def png_16(samples: np.ndarray, transparent: tuple[int, ...] | None = None) -> bytes:
    """A 16-bit PNG, grey (H, W) or RGB (H, W, 3), made by hand: Pillow cannot write RGB ones."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    colour_type = 2 if samples.ndim == 3 else 0
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if transparent is not None:
        body += chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in transparent))
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


UPRIGHT = {  # orientation -> how the stored array becomes upright, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_orientation_is_applied(orientation, kind):
    stored = picture()
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = pixels(encode(stored, kind, **options))
    turned = pixels(encode(stored, kind, exif=with_orientation(orientation), **options))
    expected = UPRIGHT[orientation](plain)
    # AVIF is lossy and may encode a rotated file differently; the others are exact.
    np.testing.assert_allclose(turned.astype(int), expected, atol=40 if kind == "AVIF" else 0)


def test_unreadable_exif_counts_as_upright():
    stored = picture()
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 20
    np.testing.assert_array_equal(
        pixels(encode(stored, "JPEG", exif=exif)), pixels(encode(stored, "JPEG"))
    )


def test_cmyk():
    stored = picture().convert("CMYK")
    for data in (encode(stored, "JPEG", quality=95), encode(stored, "TIFF")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(pixels(data), expected)
    assert abs(pixels(encode(stored, "TIFF")).astype(int) - np.asarray(picture())).max() <= 1


def test_alpha_is_composited_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3] = (10, 100, 200)
    rgba[0, :, 3] = (0, 128, 255)
    rgba[1, :, 3] = (255, 0, 1)
    out = pixels(encode(Image.fromarray(rgba), "PNG"))
    alpha = rgba[..., 3:].astype(float) / 255
    expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    np.testing.assert_allclose(out, expected, atol=1)
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[0, 2].tolist() == [10, 100, 200]


def test_grey_with_alpha():
    la = Image.merge("LA", (Image.new("L", (2, 1), 40), Image.fromarray(np.uint8([[0, 255]]))))
    assert pixels(encode(la, "PNG")).tolist() == [[[255] * 3, [40] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind):
    stored = Image.new("P", (2, 1))
    stored.putpalette([9, 8, 7, 200, 100, 50])
    stored.putpixel((1, 0), 1)
    assert pixels(encode(stored, kind)).tolist() == [[[9, 8, 7], [200, 100, 50]]]
    transparent = pixels(encode(stored, kind, transparency=0))
    assert transparent.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_palette_with_partial_alpha():
    stored = Image.new("P", (1, 1))
    stored.putpalette([0, 0, 0])
    assert pixels(encode(stored, "PNG", transparency=bytes([51]))).tolist() == [[[204] * 3]]


def test_one_transparent_colour():
    stored = Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]]))
    out = pixels(encode(stored, "PNG", transparency=(1, 2, 3)))
    assert out.tolist() == [[[255, 255, 255], [4, 5, 6]]]
    grey = pixels(encode(Image.fromarray(np.uint8([[7, 8]])), "PNG", transparency=7))
    assert grey.tolist() == [[[255] * 3, [8] * 3]]


def test_16_bit_grey_is_scaled():
    samples = np.uint16([[0, 255, 256, 32768, 65535]])
    expected = [[[v] * 3 for v in (0, 0, 1, 128, 255)]]
    assert pixels(png_16(samples)).tolist() == expected
    assert pixels(encode(Image.fromarray(samples), "TIFF")).tolist() == expected
    pgm = b"P5 5 1 65535\n" + samples.astype(">u2").tobytes()
    assert pixels(pgm).tolist() == expected
    transparent = pixels(png_16(samples, transparent=(256,)))
    assert transparent.tolist() == [[[v] * 3 for v in (0, 0, 255, 128, 255)]]


def test_16_bit_rgb_is_scaled():
    samples = np.uint16([[[0, 256, 65535], [511, 32768, 40000]]])
    assert pixels(png_16(samples)).tolist() == [[[0, 1, 255], [1, 128, 156]]]
    transparent = pixels(png_16(samples, transparent=(511, 32768, 40000)))
    assert transparent.tolist() == [[[0, 1, 255], [255, 255, 255]]]


def test_bilevel_and_grey():
    assert pixels(encode(Image.new("1", (2, 2), 1), "PNG")).tolist() == [[[255] * 3] * 2] * 2
    grey = picture().convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(encode(grey, "PNG")), expected)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several(kind):
    first, second = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2


def test_icc_profiles_are_not_applied():
    stored = picture()
    for kind in ("JPEG", "PNG", "TIFF"):
        plain = pixels(encode(stored, kind))
        broken = encode(stored, kind, icc_profile=b"\x00\x00\x02\x00garbage" * 40)
        np.testing.assert_array_equal(pixels(broken), plain)


@pytest.mark.parametrize("size", [(1, 1), (30000, 2), (2, 30000), (1, 65000)])
def test_extreme_sides(size):
    for kind in ("PNG", "JPEG"):
        assert pixels(encode(Image.new("RGB", size), kind)).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_truncated_is_refused(kind):
    data = encode(picture(200, 150), kind)
    for share in (0.02, 0.3, 0.5, 0.9):
        with pytest.raises(UnusableImage) as caught:
            decode_image(data[: int(len(data) * share)])
        assert caught.value.reason in ("truncated", "corrupt", "not_an_image")


def test_reasons():
    cases = {
        b"": "empty",
        b"plain text": "not_an_image",
        b"<!DOCTYPE html><html><body>404</body></html>": "not_an_image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n": "not_an_image",
        encode(picture(), "JPEG")[:-100]: "truncated",
        encode(Image.new("F", (3, 3)), "TIFF"): "unsupported_mode",
        encode(Image.new("I", (3, 3), 70000), "TIFF"): "unsupported_mode",
        encode(Image.new("1", (20000, 20000)), "PNG"): "too_many_pixels",
    }
    for data, reason in cases.items():
        for decode in (decode_image, decode_array):
            with pytest.raises(UnusableImage) as caught:
                decode(data)
            assert caught.value.reason == reason
            assert str(caught.value).startswith(reason)


def test_bombs_are_refused_from_the_header():
    bomb = encode(Image.new("1", (9000, 9000)), "PNG")
    header_only = bomb[:60]  # no pixels are there to be decoded
    with pytest.raises(UnusableImage, match="81000000 pixels, more than max_pixels = 1000000"):
        decode_image(header_only, max_pixels=1_000_000)
    assert decode_image(encode(picture(), "PNG"), max_pixels=37 * 23).size == (37, 23)
    with pytest.raises(UnusableImage, match="too_many_pixels"):
        decode_array(encode(picture(), "PNG"), max_pixels=37 * 23 - 1)


def test_pillow_globals_are_neither_changed_nor_relied_on(monkeypatch):
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    decode_image(encode(picture(), "JPEG"))
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnusableImage, match="too_many_pixels"):
        decode_image(encode(Image.new("1", (20000, 20000)), "PNG"))


def test_an_unusable_image_survives_a_trip_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(UnusableImage("truncated", "7 bytes short")))
    assert (error.reason, error.detail) == ("truncated", "7 bytes short")


def test_digest_is_of_the_bytes():
    assert image_digest(b"").hex() == "cae66941d9efbd404e4d88758ea67670"


@pytest.mark.skipif(images.simplejpeg is None, reason="needs the jpeg extra")
class TestPlainJpeg:
    """libjpeg-turbo's own interface gives Pillow's bits, or steps aside."""

    @staticmethod
    def both(data: bytes):
        image = Image.open(io.BytesIO(data))
        return images._decode_plain_jpeg(image, data), np.asarray(decode_image(data))

    @pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
    def test_subsamplings_and_odd_sizes(self, subsampling):
        taken = 0
        for seed, (width, height) in enumerate(
            [(1, 1), (7, 5), (8, 8), (16, 16), (17, 33), (31, 64), (100, 75), (129, 97), (3, 200)]
        ):
            for quality in (30, 75, 95, 100):
                source = np.asarray(picture(width, height, seed))
                if subsampling == "Gray":
                    data = encode(Image.fromarray(source).convert("L"), "JPEG", quality=quality)
                else:
                    data = images.simplejpeg.encode_jpeg(
                        source, quality, colorsubsampling=subsampling
                    )
                ours, pillows = self.both(data)
                if ours is not None:
                    taken += 1
                    np.testing.assert_array_equal(ours, pillows)
        assert taken == 36

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, orientation):
        ours, pillows = self.both(encode(picture(), "JPEG", exif=with_orientation(orientation)))
        np.testing.assert_array_equal(ours, pillows)

    def test_steps_aside(self):
        for options in ({"progressive": True}, {"keep_rgb": True}):
            assert self.both(encode(picture(), "JPEG", **options))[0] is None
        assert self.both(encode(picture().convert("CMYK"), "JPEG"))[0] is None

    def test_restart_intervals_and_optimised_tables(self):
        for options in (
            {"restart_marker_rows": 1},
            {"optimize": True},
            {"restart_marker_blocks": 3},
        ):
            ours, pillows = self.both(encode(picture(90, 70), "JPEG", **options))
            np.testing.assert_array_equal(ours, pillows)


SEEDS = [
    encode(picture(61, 47), "JPEG"),
    encode(picture(61, 47), "JPEG", progressive=True, exif=with_orientation(6)),
    encode(picture(61, 47).convert("CMYK"), "JPEG"),
    encode(picture(61, 47).convert("L"), "JPEG", restart_marker_rows=1),
    encode(picture(61, 47), "PNG"),
    encode(picture(61, 47).convert("P"), "PNG", transparency=3),
    encode(picture(61, 47).convert("RGBA"), "PNG", exif=with_orientation(3)),
    png_16(np.asarray(picture(20, 10)).astype(np.uint16) * 257),
    encode(picture(61, 47), "GIF", save_all=True, append_images=[picture(61, 47, 1)]),
    encode(picture(61, 47), "WEBP"),
    encode(
        picture(61, 47), "WEBP", lossless=True, save_all=True, append_images=[picture(61, 47, 1)]
    ),
    *(encode(picture(61, 47), kind) for kind in ("BMP", "PPM", "JPEG2000", "AVIF")),
    *(encode(picture(61, 47), "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")),
    encode(picture(61, 47), "MPO", save_all=True, append_images=[picture(61, 47, 1)]),
]


def mutate(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(6)
        if kind == 0:  # flip bits anywhere
            for _ in range(rng.choice((1, 4, 32))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # flip bits in the header
            for _ in range(rng.choice((1, 3))):
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        elif kind == 2:  # truncate
            del data[rng.randrange(1, len(data)) :]
        elif kind == 3:  # another file's header on this body
            head = rng.choice(SEEDS)
            cut = rng.randrange(1, 300)
            data = bytearray(head[:cut]) + data[cut:] or bytearray(b"\0")
        elif kind == 4:  # repeat or drop a stretch
            start = rng.randrange(len(data))
            stop = min(len(data), start + rng.randrange(1, 64))
            data[start:start] = data[start:stop] * rng.choice((1, 5))
        else:  # big numbers where lengths and sizes live
            start = rng.randrange(max(1, min(len(data), 400) - 4))
            data[start : start + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(8))
def test_mutated_files_decode_or_are_unusable(batch):
    """4,000 mutants; both decoders agree on every one, pixels and verdict alike."""
    rng = random.Random(batch)
    usable = 0
    for _ in range(500):
        data = mutate(rng)
        try:
            expected, reason = np.asarray(decode_image(data, max_pixels=4_000_000)), None
        except UnusableImage as error:
            expected, reason = None, error.reason
        try:
            got = decode_array(data, max_pixels=4_000_000)
        except UnusableImage as error:
            assert error.reason == reason
        else:
            assert reason is None
            np.testing.assert_array_equal(got, expected)
            usable += 1
    assert 50 < usable < 450  # the mutations are neither harmless nor hopeless


@given(st.binary(max_size=400), st.sampled_from([seed[:12] for seed in SEEDS]))
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes(tail, head):
    for data in (tail, head + tail):
        with contextlib.suppress(UnusableImage):
            decode_image(data, max_pixels=1_000_000)


def test_threads_decode_alike():
    files = [encode(picture(150, 120, seed), kind) for seed in range(6) for kind in ("JPEG", "PNG")]
    expected = [pixels(data) for data in files]
    failures = []

    def work():
        for _ in range(5):
            for data, want in zip(files, expected, strict=True):
                if not np.array_equal(decode_array(data), want):
                    failures.append(data)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
