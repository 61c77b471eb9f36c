"""Brightness, contrast and saturation as Pillow's ImageEnhance defines them, exact and fast.

Each is a blend with a grey picture (black; the mean grey level; the image in grey), cut down to
8 bits after every step. `jitter` is Pillow's own; `fast_jitter` does the same to arrays, but for
factors of saturation of few bits, in blocks that stay in the processor's cache, or compiled where
numba is installed.
"""

import functools
import math
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from PIL import Image

Jitter = Literal["brightness", "contrast", "saturation"]
# Jitters with their factors, in the order of application.
Steps = list[tuple[Jitter, float]]

# Pillow's weights of red, green and blue in grey, in 1/65536 (ITU-R 601-2).
_GREY_WEIGHTS: Final = (19595, 38470, 7471)
# Bytes of float32 pixels that are taken through all steps at once.
_BLOCK_BYTES: Final = 2**19
# Pixels from which the effect of earlier steps on the mean grey level is estimated.
_SAMPLE_PIXELS: Final = 3_000


def jitter(image: Image.Image, name: Jitter, factor: float, pivot: int) -> Image.Image:
    """One step on an RGB image, equal to ImageEnhance's; ``pivot`` is its `mean_grey`."""
    if name == "saturation":
        return Image.blend(image.convert("L").convert("RGB"), image, factor)
    return image.point(list(_blend_table(pivot if name == "contrast" else 0, factor)) * 3)


def mean_grey(image: Image.Image) -> int:
    """The level about which ImageEnhance.Contrast turns."""
    counts = image.convert("L").histogram()
    total = sum(level * count for level, count in enumerate(counts))
    return int(total / (image.width * image.height) + 0.5)


def fast_mean_grey(pixels: np.ndarray, steps: Steps) -> int:
    """`mean_grey` of uint8 (height, width, 3) after ``steps``, nearly always.

    The mean of the untouched image comes from the sums of its channels. Brightness scales it, and
    what clipping and rounding do to it besides is seen on a small sample.
    """
    height, width = pixels.shape[:2]
    mean = float(_channel_sums(pixels) @ np.array(_GREY_WEIGHTS)) / 65536 / (height * width)
    if steps:
        stride = max(1, math.isqrt(height * width // _SAMPLE_PIXELS))
        down, across = min(stride, height), min(stride, width)
        sample = pixels[down // 2 :: down, across // 2 :: across]
        planes = sample.transpose(2, 0, 1).astype(np.float32, order="C")
        gain = math.prod(factor for name, factor in steps if name == "brightness")
        before = float(_grey(planes).mean(dtype=np.float64))
        _blend(planes, _few_bits(steps), 0)
        after = float(_grey(planes).mean(dtype=np.float64))
        mean = gain * mean + (after - gain * before)
    return int(mean + 0.5)


def fast_jitter(
    pixels: np.ndarray, rows: slice, columns: slice, flip: bool, steps: Steps, pivot: int
) -> np.ndarray:
    """All steps on a box of uint8 (height, width, 3), mirrored if ``flip``.

    Returns contiguous uint8 (3, h, w), of the same bits with numba and without.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    planes = np.empty((3, height, width), np.uint8)
    steps = _few_bits(steps)
    compiled = _compiled()
    if compiled is not None:
        levels = {"brightness": 0, "contrast": pivot, "saturation": -1}
        compiled(
            np.ascontiguousarray(pixels),
            rows.start,
            columns.start,
            flip,
            planes,
            np.array([levels[name] for name, _ in steps], np.float32),
            np.array([factor for _, factor in steps], np.float32),
        )
        return planes
    box = pixels[rows, columns][:, :: -1 if flip else 1]
    block = max(1, _BLOCK_BYTES // (12 * width))
    for start in range(0, height, block):
        part = planes[:, start : start + block]
        for channel in range(3):  # Three times as fast as numpy's copy of the transposed box.
            part[channel] = box[start : start + block, :, channel]
        values = part.astype(np.float32)
        _blend(values, steps, pivot)
        part[...] = values
    return planes


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """`compiled_jitter.jitter_box`, or None where numba is missing or cannot load or compile it."""
    try:
        from beit.compiled_jitter import jitter_box
    except Exception:
        # No numba, or a cache that is full, damaged or not ours: the bits are the same without.
        return None
    function: Callable[..., None] = jitter_box
    return function


def _few_bits(steps: Steps) -> Steps:
    """Factors of saturation as 16-bit integers hold them, where they do: v0.1.0 reckoned in those.

    A run that it began goes on with the same pixels; to a level, they are Pillow's.
    """
    return [(name, _rounded(factor) if name == "saturation" else factor) for name, factor in steps]


def _rounded(factor: float) -> float:
    """With at most 7 bits of its difference from 1: the difference of two levels has 9."""
    excess = factor - 1
    if not 0 < abs(excess) <= 0.5:
        return factor
    scale = 1 << min(12, math.floor(math.log2(128 / abs(excess))))
    return 1 + round(excess * scale) / scale


def _blend(planes: np.ndarray, steps: Steps, pivot: int) -> None:
    """All steps on float32 (3, height, width) of whole numbers, in place."""
    for name, factor in steps:
        if name == "brightness":
            planes *= np.float32(factor)
        else:
            level = _grey(planes) if name == "saturation" else np.float32(pivot)
            planes -= level
            planes *= np.float32(factor)
            planes += level
        if factor > 1:  # Otherwise the result lies between two levels.
            np.clip(planes, 0, 255, out=planes)
        np.floor(planes, out=planes)


def _blend_table(level: int, factor: float) -> bytes:
    """Each of 256 levels moved away from ``level`` by ``factor``, as Pillow's blend rounds it."""
    start = np.float32(level)
    moved = start + np.float32(factor) * (np.arange(256, dtype=np.float32) - start)
    return bytes(np.clip(moved, 0, 255).astype(np.uint8))


def _grey(planes: np.ndarray) -> np.ndarray:
    """Pillow's conversion to grey of float32 (3, height, width); its sums have 24 bits: exact."""
    red, green, blue = (np.float32(weight) for weight in _GREY_WEIGHTS)
    grey: np.ndarray = planes[0] * red
    grey += planes[1] * green
    grey += planes[2] * blue
    grey += np.float32(0x8000)
    grey *= np.float32(2**-16)
    np.floor(grey, out=grey)
    return grey


def _channel_sums(pixels: np.ndarray) -> np.ndarray:
    """int64 (3,): sums over uint8 (height, width, 3); 16 bits hold the sum of 257 rows."""
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, width * 3)
    totals = np.zeros(width * 3, np.int64)
    for start in range(0, height, 257):
        totals += np.add.reduce(lines[start : start + 257], axis=0, dtype=np.uint16)
    sums: np.ndarray = totals.reshape(width, 3).sum(axis=0)
    return sums
