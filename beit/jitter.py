"""Brightness, contrast and saturation as Pillow's ImageEnhance defines them, exact and fast.

Each is a blend with a grey picture (black; the mean grey level; the image in grey), cut down to
8 bits after every step. `jitter` reproduces Pillow bit for bit. `fast_jitter` does the same to
arrays, but for saturation in 16-bit integers; its working set stays in the processor's cache.
"""

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from PIL import Image

Jitter = Literal["brightness", "contrast", "saturation"]
# Jitters with their factors, in the order of application.
Steps = list[tuple[Jitter, float]]

# Pillow's weights of red, green and blue in grey, in 1/65536 (ITU-R 601-2).
_GREY_WEIGHTS: Final = (19595, 38470, 7471)
# Bytes of pixels that are taken through all steps at once.
_BLOCK_BYTES: Final = 65_536
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
        sample = _planes(pixels[down // 2 :: down, across // 2 :: across])
        gain = math.prod(factor for name, factor in steps if name == "brightness")
        before = float(_grey(sample).mean(dtype=np.float64))
        after = float(_grey(_run(sample, _program(steps, 0))).mean(dtype=np.float64))
        mean = gain * mean + (after - gain * before)
    return int(mean + 0.5)


def fast_jitter(pixels: np.ndarray, steps: Steps, pivot: int) -> np.ndarray:
    """All steps on uint8 (height, width, 3); returns contiguous uint8 (3, height, width)."""
    height, width = pixels.shape[:2]
    program = _program(steps, pivot)
    planes = np.empty((3, height, width), np.uint8)
    rows = max(1, _BLOCK_BYTES // (3 * width))
    for start in range(0, height, rows):
        planes[:, start : start + rows] = _run(_planes(pixels[start : start + rows]), program)
    return planes


def _program(steps: Steps, pivot: int) -> list[bytes | float]:
    """A table for each run of brightness and contrast, a factor for each saturation."""
    program: list[bytes | float] = []
    for name, factor in steps:
        if name == "saturation":
            program.append(factor)
            continue
        table = _blend_table(pivot if name == "contrast" else 0, factor)
        if program and isinstance(program[-1], bytes):
            program[-1] = program[-1].translate(table)
        else:
            program.append(table)
    return program


def _run(planes: np.ndarray, program: Sequence[bytes | float]) -> np.ndarray:
    for step in program:
        if isinstance(step, bytes):
            translated = bytearray(planes).translate(step)
            planes = np.frombuffer(translated, np.uint8).reshape(planes.shape)
        else:
            planes = _saturate(planes, step)
    return planes


def _blend_table(level: int, factor: float) -> bytes:
    """Each of 256 levels moved away from ``level`` by ``factor``, as Pillow's blend rounds it."""
    start = np.float32(level)
    moved = start + np.float32(factor) * (np.arange(256, dtype=np.float32) - start)
    return bytes(np.clip(moved, 0, 255).astype(np.uint8))


def _saturate(planes: np.ndarray, factor: float) -> np.ndarray:
    """Saturation of uint8 (3, height, width), in fixed-point numbers of 16 bits where they do."""
    grey = _grey(planes)
    excess = factor - 1
    if abs(excess) > 0.5:
        moved = np.subtract(planes, grey, dtype=np.float32)
        moved *= np.float32(factor)
        moved += grey
        saturated: np.ndarray = np.clip(moved, 0, 255, out=moved).astype(np.uint8)
        return saturated
    # colour + excess * (colour - grey): the difference has 9 bits, which leaves 7 for the excess.
    shift = min(12, math.floor(math.log2(128 / abs(excess))))
    change = np.subtract(planes, grey, dtype=np.int16)
    change *= np.int16(round(excess * 2**shift))
    change >>= np.int16(shift)
    change += planes
    if excess > 0:  # Otherwise the result lies between two levels.
        np.clip(change, 0, 255, out=change)
    out: np.ndarray = change.astype(np.uint8)
    return out


def _grey(planes: np.ndarray) -> np.ndarray:
    """Pillow's conversion to grey of uint8 (3, height, width)."""
    red, green, blue = (np.uint32(weight) for weight in _GREY_WEIGHTS)
    grey = planes[0] * red
    grey += np.uint32(0x8000)
    grey += planes[1] * green
    grey += planes[2] * blue
    grey >>= np.uint32(16)
    out: np.ndarray = grey.astype(np.uint8)
    return out


def _channel_sums(pixels: np.ndarray) -> np.ndarray:
    """int64 (3,): sums over uint8 (height, width, 3); 16 bits hold the sum of 257 rows."""
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, width * 3)
    totals = np.zeros(width * 3, np.int64)
    for start in range(0, height, 257):
        totals += np.add.reduce(lines[start : start + 257], axis=0, dtype=np.uint16)
    sums: np.ndarray = totals.reshape(width, 3).sum(axis=0)
    return sums


def _planes(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) to a contiguous copy (3, height, width)."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
