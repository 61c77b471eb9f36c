"""Augmentation of a view for fine-tuning: RandAugment and random erasing, drawn as values.

Like a view, an augmentation is drawn from (seed, image digest, epoch) alone and applied later, so
it does not matter where or in whose company. Provenance: RandAugment (arXiv 1909.13719) as BEiT's
recipes use it, `rand-m9-mstd0.5-inc1` of timm (`timm/data/auto_augment.py`), whose operations
these equal bit for bit; random erasing (arXiv 1708.04896) in its `pixel` mode
(`timm/data/random_erasing.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from beit import counters

Colour = tuple[int, int, int]

MAX_MAGNITUDE: Final = 10.0
# Chance that an operation which was picked is applied.
OPERATION_PROBABILITY: Final = 0.5
ERASED_AREA: Final = (0.02, 1 / 3)
ERASED_ASPECT: Final = (0.3, 1 / 0.3)
_ERASE_TRIES: Final = 10
_WORDS_PER_OPERATION: Final = 4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to one view."""

    operations: tuple[tuple[str, float], ...]
    """Names of `OPERATIONS` with their strength: signed, in [-1, 1]; in order."""
    erased: tuple[int, int, int, int] | None
    """Top, left, height, width of what noise replaces, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Noise in place of pixels, in units of normalised ones."""

    top: int
    left: int
    noise: np.ndarray
    """float32 (3, height, width), N(0, 1)."""


def augmentation_of(
    digest: bytes,
    epoch: int,
    *,
    seed: int,
    size: int,
    num_operations: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    erase_probability: float = 0.25,
) -> Augmentation:
    """The augmentation of the image with this 16-byte digest in an epoch; views are size x size.

    Every decision has words of its own, so none shifts another.
    """
    position = (epoch, *counters.of_digest(digest))
    count = _WORDS_PER_OPERATION * num_operations
    draws = counters.uniforms(seed, counters.AUGMENTATIONS, position, count)
    operations = []
    for pick, apply, strength, sign in zip(*[iter(draws)] * _WORDS_PER_OPERATION, strict=True):
        if apply >= OPERATION_PROBABILITY:
            continue
        level = magnitude
        if magnitude_std > 0:
            level = NormalDist(magnitude, magnitude_std).inv_cdf(max(strength, 2**-53))
        level = min(max(level, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
        name = _NAMES[int(pick * len(_NAMES))]
        operations.append((name, -level if sign < 0.5 else level))
    words = counters.uniforms(seed, counters.ERASURES, position, 1 + 4 * _ERASE_TRIES)
    erased = _erased_box(words[1:], size) if words[0] < erase_probability else None
    return Augmentation(operations=tuple(operations), erased=erased)


def apply_operations(
    pixels: np.ndarray, operations: Sequence[tuple[str, float]], fill: Colour
) -> np.ndarray:
    """Operations on uint8 (height, width, 3), one after the other; `fill` comes in from outside."""
    if not operations:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for name, strength in operations:
        image = OPERATIONS[name](image, strength, fill)
    return np.array(image)


def erasure_of(digest: bytes, epoch: int, box: tuple[int, int, int, int], *, seed: int) -> Erasure:
    """The noise of an `Augmentation.erased`."""
    top, left, height, width = box
    position = (epoch, *counters.of_digest(digest))
    generator = counters.generator(seed, counters.ERASED_PIXELS, position)
    noise = generator.standard_normal((3, height, width), dtype=np.float32)
    return Erasure(top=top, left=left, noise=noise)


def _erased_box(draws: Sequence[float], size: int) -> tuple[int, int, int, int] | None:
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    smallest, largest = ERASED_AREA
    for area_draw, aspect_draw, top_draw, left_draw in zip(*[iter(draws)] * 4, strict=True):
        area = (smallest + area_draw * (largest - smallest)) * size * size
        aspect = math.exp(low + aspect_draw * (high - low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            top = int(top_draw * (size - height + 1))
            left = int(left_draw * (size - width + 1))
            return top, left, height, width
    return None


Operation = Callable[[Image.Image, float, Colour], Image.Image]
Enhancer = Callable[[Image.Image], ImageEnhance._Enhance]


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Colour) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _rotate(image: Image.Image, strength: float, fill: Colour) -> Image.Image:
    return image.rotate(30 * strength, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, strength: float, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0.3 * strength, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, strength: float, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, 0, 0.3 * strength, 1, 0), fill)


def _translate_x(image: Image.Image, strength: float, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, strength: float, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), fill)


def _posterize(image: Image.Image, strength: float, _: Colour) -> Image.Image:
    # At full strength none would be left, a black picture: Pillow 13 refuses to draw it.
    return ImageOps.posterize(image, max(1, 4 - int(4 * abs(strength))))


def _solarize(image: Image.Image, strength: float, _: Colour) -> Image.Image:
    return ImageOps.solarize(image, 256 - min(256, int(256 * abs(strength))))


def _solarize_add(image: Image.Image, strength: float, _: Colour) -> Image.Image:
    more = min(128, int(110 * abs(strength)))
    table = [min(255, level + more) if level < 128 else level for level in range(256)]
    return image.point(table * 3)


def _enhanced(enhancer: Enhancer) -> Operation:
    def enhance(image: Image.Image, strength: float, _: Colour) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1.0 + 0.9 * strength))

    return enhance


#: Each takes an RGB image, a strength in [-1, 1] and the colour of what comes in from outside.
OPERATIONS: Final[dict[str, Operation]] = {
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
_NAMES: Final = tuple(OPERATIONS)
