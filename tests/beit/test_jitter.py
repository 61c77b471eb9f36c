"""The fast jitter is that of v0.1.0, bit for bit, compiled or not: Pillow's but for saturation."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beit import jitter
from beit.jitter import fast_jitter

FACTORS = st.sampled_from([0.0, 0.37, 0.6, 0.9, 1.0001, 1.1, 1.4, 3.0])


@pytest.fixture(params=["numpy", "numba"])
def form(request, monkeypatch):
    """Which of both runs; fails where numba is installed and not used."""
    jitter._compiled.cache_clear()
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "beit.compiled_jitter", raising=False)
        assert jitter._compiled() is None
    elif importlib.util.find_spec("numba"):
        assert jitter._compiled() is not None
    else:
        pytest.skip("needs the fast extra")
    yield
    jitter._compiled.cache_clear()


def expected_of(pixels, steps, pivot):
    """Pillow's steps, and saturation in integers of 16 bits where they hold the factor."""
    for name, factor in steps:
        image, excess = Image.fromarray(pixels), factor - 1
        if name != "saturation" or not 0 < abs(excess) <= 0.5:
            pixels = np.asarray(jitter.jitter(image, name, factor, pivot))
            continue
        shift = min(12, math.floor(math.log2(128 / abs(excess))))
        change = pixels.astype(np.int16) - np.asarray(image.convert("L"))[..., None]
        change = (change * np.int16(round(excess * 2**shift))) >> shift
        pixels = np.clip(pixels + change, 0, 255).astype(np.uint8)
        assert change.dtype == np.int16
    return pixels


@given(
    st.permutations(("brightness", "contrast", "saturation")),
    st.lists(FACTORS, max_size=3),
    st.booleans(),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def check(order, factors, flip, pivot, seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 90, 2)
    pixels = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    top, bottom = np.sort(random.choice(height + 1, 2, replace=False))
    left, right = np.sort(random.choice(width + 1, 2, replace=False))
    rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))
    steps = list(zip(order, factors, strict=False))
    pixels.setflags(write=bool(seed % 2))  # Pillow hands out arrays that cannot be written to.
    planes = fast_jitter(pixels, rows, columns, flip, steps, pivot)
    assert planes.flags.c_contiguous
    expected = expected_of(pixels, steps, pivot)[rows, columns][:, :: -1 if flip else 1]
    np.testing.assert_array_equal(planes.transpose(1, 2, 0), expected)


def test_boxes_orders_and_factors(form):
    check()


def test_every_colour_that_two_channels_can_make(form, monkeypatch):
    """Grey levels of all of them, saturated: in one block, in several, in a strided picture."""
    red, green = np.mgrid[0:256, 0:256]
    colours = np.stack([red, green, 255 - red], axis=-1).astype(np.uint8)
    whole = slice(0, 256)
    steps = [("saturation", 1.37), ("contrast", 0.71)]
    expected = expected_of(colours, steps, 99).transpose(2, 0, 1)
    for pixels in (colours, np.asfortranarray(colours)):
        np.testing.assert_array_equal(fast_jitter(pixels, whole, whole, False, steps, 99), expected)
    monkeypatch.setattr(jitter, "_BLOCK_BYTES", 7 * 12 * 256)
    np.testing.assert_array_equal(fast_jitter(colours, whole, whole, False, steps, 99), expected)


def test_a_damaged_cache_is_done_without(tmp_path):
    if not importlib.util.find_spec("numba"):
        pytest.skip("needs the fast extra")
    code = """
import numpy as np
from beit import jitter

box, steps = (slice(1, 4), slice(0, 3)), [("contrast", 0.7), ("saturation", 1.3)]
pixels = np.arange(0, 240, 5, np.uint8).reshape(4, 4, 3)
planes = jitter.fast_jitter(pixels, *box, True, steps, 99)
print(jitter._compiled() is not None, planes.tolist())
"""

    def said():
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            text=True, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        return done.stdout.partition(" ")

    compiled, _, expected = said()
    assert compiled == "True"
    (index,) = tmp_path.rglob("*.nbi")
    index.write_bytes(index.read_bytes()[:20])
    assert said() == ("False", " ", expected)
