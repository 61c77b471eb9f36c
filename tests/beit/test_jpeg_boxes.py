"""Boxes of JPEGs decoded without the rest: the pixels of the whole picture, or none."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from beit import images, jpeg_boxes
from beit.images import UnusableImage, as_plain_jpeg, decode_array
from tests.beit.test_images import SEEDS, encode, mutate, picture, with_orientation

pytestmark = pytest.mark.skipif(
    not jpeg_boxes.available(), reason="needs libjpeg-turbo 3 (the jpeg extra)"
)


def boxes(rng, height, width):
    """Boxes anywhere in a picture: small ones, edges, all of it."""
    yield slice(0, height), slice(0, width)
    for _ in range(5):
        top, left = rng.randrange(height), rng.randrange(width)
        bottom, right = rng.randint(top + 1, height), rng.randint(left + 1, width)
        yield slice(top, bottom), slice(left, right)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_boxes_are_those_of_the_whole_picture(subsampling):
    rng = random.Random(0)
    for seed, (width, height) in enumerate(
        [(1, 1), (7, 5), (16, 16), (17, 33), (129, 97), (3, 200), (300, 211)]
    ):
        source = np.asarray(picture(width, height, seed))
        if subsampling == "Gray":
            data = encode(Image.fromarray(source).convert("L"), "JPEG", quality=85)
        else:
            data = images.simplejpeg.encode_jpeg(source, 85, colorsubsampling=subsampling)
        whole, jpeg = decode_array(data), as_plain_jpeg(data)
        assert (jpeg.height, jpeg.width) == (height, width)
        for rows, columns in boxes(rng, height, width):
            np.testing.assert_array_equal(jpeg.decode(rows, columns), whole[rows, columns])


def test_other_files_are_decoded_whole():
    for options in ({"progressive": True}, {"keep_rgb": True}, {"exif": with_orientation(6)}):
        assert as_plain_jpeg(encode(picture(), "JPEG", **options)) is None
    for data in (encode(picture().convert("CMYK"), "JPEG"), encode(picture(), "PNG"), b"", b"x"):
        assert as_plain_jpeg(data) is None
    whole = encode(picture(90, 70), "JPEG")
    top = slice(0, 8)
    assert as_plain_jpeg(whole).decode(top, top) is not None
    # What is not there is missed where a box needs it.
    cut = as_plain_jpeg(whole[:-40])
    np.testing.assert_array_equal(cut.decode(top, top), decode_array(whole)[:8, :8])
    assert cut.decode(slice(60, 70), top) is None


def test_without_the_library_none_is_decoded(monkeypatch):
    monkeypatch.setattr(jpeg_boxes, "_library", lambda: None)
    assert as_plain_jpeg(encode(picture(), "JPEG")) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(2))
def test_boxes_of_mutated_files(batch):
    """1,000 mutants: what is decoded at all is what the whole file shows there."""
    rng = random.Random(batch)
    decoded = 0
    for _ in range(500):
        data = mutate(rng, [SEEDS[0], SEEDS[3]])
        jpeg = as_plain_jpeg(data, max_pixels=4_000_000)
        if jpeg is None:
            continue
        *_, (rows, columns) = boxes(rng, jpeg.height, jpeg.width)
        box = jpeg.decode(rows, columns)
        if box is None:
            continue
        with contextlib.suppress(UnusableImage):  # damaged behind the box
            whole = decode_array(data, max_pixels=4_000_000)
            np.testing.assert_array_equal(box, whole[rows, columns])
            decoded += 1
    assert 20 < decoded < 400, decoded


def test_threads_have_decoders_of_their_own():
    files = [encode(picture(150, 120, seed), "JPEG") for seed in range(6)]
    rows, columns = slice(30, 90), slice(40, 130)
    expected = [decode_array(data)[rows, columns] for data in files]

    def work(number):
        box = as_plain_jpeg(files[number % 6]).decode(rows, columns)
        return np.array_equal(box, expected[number % 6])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(240)))
