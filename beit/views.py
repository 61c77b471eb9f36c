"""Views: one augmentation of one image, as a value that can be drawn and rendered again anywhere.

A view is drawn by `sample_view` from nothing but (policy seed, image digest, view index, height,
width), so two jobs that never met agree on it. The patch view and the tokenizer's view are then
rendered from the same jittered crop, in the order of the BEiT paper's code: jitter on the full
image, flip, one crop box, resized from source pixels. Source: BEiT (arXiv 2106.08254, section 3.1
and appendix); box and jitter follow torchvision's RandomResizedCrop and ColorJitter for Pillow
images, whose results the exact renderer reproduces bit for bit. `docs/views.md` says how and why.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from PIL import Image

from beit import counters
from beit.jitter import Jitter, Steps, fast_jitter, fast_mean_grey, jitter, mean_grey
from beit.view_policy import ViewPolicy as ViewPolicy  # noqa: PLC0414 - users take it from here

if TYPE_CHECKING:
    import torch

Interpolation = Literal["bicubic", "lanczos", "bilinear"]

_JITTERS: Final[tuple[Jitter, Jitter, Jitter]] = ("brightness", "contrast", "saturation")
_ORDERS: Final = tuple((a, b, c) for a, b, c in itertools.permutations(_JITTERS))
_RESAMPLING: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}
_CROP_TRIES: Final = 10


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmentation. The box is in pixels of the full image *after* the flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    order: tuple[Jitter, Jitter, Jitter] = _JITTERS
    grey_level: int | None = None
    """About which contrast turns (`render_all` tells it), where it is known: then nothing but the
    pixels of the box is looked at."""

    @property
    def sees_its_box_only(self) -> bool:
        """Whether it can be rendered without the rest of the image."""
        return self.contrast == 1.0 or self.grey_level is not None

    def source_box(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the unflipped image of these sides that the view shows.

        Raises:
            ValueError: the box leaves the image.
        """
        bottom, right = self.top + self.height, self.left + self.width
        inside = 0 <= self.top < bottom <= height and 0 <= self.left < right <= width
        if not inside:
            message = f"{self} does not lie within {height}x{width} pixels: drawn for another?"
            raise ValueError(message)
        left = width - right if self.flip else self.left
        return slice(self.top, bottom), slice(left, left + self.width)


def sample_view(policy: ViewPolicy, digest: bytes, index: int, height: int, width: int) -> View:
    """Draw view ``index`` of the image with this 16-byte digest and these sides in pixels.

    Its draws are those of `beit.counters.VIEWS` at (index, digest). Every decision has its own
    words, so none shifts another. Raises ValueError if digest, index or sides are out of range.
    """
    if len(digest) != 16:
        raise ValueError(f"digest has {len(digest)} bytes: give the 16 bytes of image_digest")
    if not 0 <= index < 2**64:
        raise ValueError(f"index = {index}: give a view index in [0, 2**64)")
    if height < 1 or width < 1:
        raise ValueError(f"height, width = {height}, {width}: give sides of at least one pixel")
    position = (index, *counters.of_digest(digest))
    draws = counters.uniforms(policy.seed, counters.VIEWS, position, 5 + 4 * _CROP_TRIES)
    top, left, box_height, box_width = _sample_box(policy, draws[5:], height, width)
    return View(
        top=top,
        left=left,
        height=box_height,
        width=box_width,
        flip=draws[0] < policy.flip_probability,
        order=_ORDERS[int(draws[1] * len(_ORDERS))],
        brightness=_jitter_factor(policy.brightness, draws[2]),
        contrast=_jitter_factor(policy.contrast, draws[3]),
        saturation=_jitter_factor(policy.saturation, draws[4]),
    )


def view_of(digest: bytes, epoch: int, views: Sequence[int] | np.ndarray) -> int:
    """The view of an image in an epoch: (epoch + hash of the image) mod V over all V ``views``.

    Images start at different views, so every epoch mixes all of them, and V epochs show each
    image in each view once. Without ``views`` every epoch draws one of its own.
    """
    if not len(views):
        return epoch
    return int(views[(epoch + counters.of_digest(digest)[0]) % len(views)])


def center_view(height: int, width: int, crop_fraction: float = 224 / 256) -> View:
    """The plain view for evaluation: a centred square of this fraction of the shorter side."""
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction = {crop_fraction}: give a number in (0, 1]")
    side = max(1, round(min(height, width) * crop_fraction))
    return View(top=(height - side) // 2, left=(width - side) // 2, height=side, width=side)


def render(
    image: Image.Image | np.ndarray,
    view: View,
    size: int,
    interpolation: Interpolation = "bicubic",
) -> np.ndarray:
    """Render one view to uint8 (size, size, 3); the exact reference for tokens.

    ``image`` is RGB (a Pillow image, or uint8 (height, width, 3)). Equals, bit for bit, Pillow's
    ImageEnhance on the full image in the view's order, then mirror, crop and resize; only work
    that cannot be seen in the crop is left out. Raises ValueError if the box leaves the image.
    """
    return render_sizes(image, view, [(size, interpolation)])[0]


def render_sizes(
    image: Image.Image | np.ndarray,
    view: View,
    outputs: Sequence[tuple[int, Interpolation]],
) -> list[np.ndarray]:
    """`render` at several (size, interpolation), each resized from the same jittered crop."""
    return render_all(image, view, outputs)[0] if outputs else []


def render_all(
    image: Image.Image | np.ndarray,
    view: View,
    outputs: Sequence[tuple[int, Interpolation]],
) -> tuple[list[np.ndarray], int]:
    """`render_sizes`, and the view's `grey_level`: in [0, 255], 0 where contrast stays."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.mode != "RGB":
        raise ValueError(f"image of mode {image.mode}: give RGB, as decode_image does")
    crop, grey_level = _jittered_crop(image, view)
    rendered = [
        np.array(crop.resize((size, size), _RESAMPLING[interpolation]))
        for size, interpolation in outputs
    ]
    return rendered, grey_level


def render_fast(pixels: np.ndarray, view: View, size: int) -> np.ndarray:
    """Nearly `render(pixels, view, size, "bicubic")`, for training only: never for tokens.

    ``pixels`` is uint8 (height, width, 3); so is the result, with sides ``size`` (its memory is
    channel-first, ready for a batch). Three things differ from `render`: torch's antialiased
    bicubic filter on uint8 rounds its weights differently, factors of saturation have few bits, and
    the grey level about which contrast turns, where the view does not say it, is estimated if
    jitters precede it. On photographs the mean absolute difference is 0.02 grey levels, and 0.05 is
    the bound that `tests/beit/test_views.py` holds it to.
    """
    import torch

    rows, columns = view.source_box(*pixels.shape[:2])
    steps, on_full = _steps(view)
    pivot = view.grey_level or 0
    if not view.sees_its_box_only:
        pivot = fast_mean_grey(pixels, steps[:on_full])
    planes = fast_jitter(pixels, rows, columns, view.flip, steps, pivot)
    resized = torch.from_numpy(planes)[None]
    # Pillow 13 resizes rows before columns in just this case; the other order rounds otherwise.
    if view.height > size and view.height - size > 2 * (view.width - size):
        resized = _resize_planes(resized, size, view.width)
    return _resize_planes(resized, size, size)[0].permute(1, 2, 0).numpy()


def _jitter_factor(strength: float, uniform: float) -> float:
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + uniform * (high - low)


def _sample_box(
    policy: ViewPolicy, draws: Sequence[float], height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as RandomResizedCrop draws it."""
    low, high = math.log(policy.min_aspect), math.log(policy.max_aspect)
    for area_draw, aspect_draw, top_draw, left_draw in zip(*[iter(draws)] * 4, strict=True):
        share = policy.min_area + area_draw * (policy.max_area - policy.min_area)
        aspect = math.exp(low + aspect_draw * (high - low))
        box_width = round(math.sqrt(height * width * share * aspect))
        box_height = round(math.sqrt(height * width * share / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    # No box fitted: the largest centred one of an allowed aspect.
    box_height, box_width = height, width
    if width < height * policy.min_aspect:
        box_height = max(1, round(width / policy.min_aspect))
    elif width > height * policy.max_aspect:
        box_width = max(1, round(height * policy.max_aspect))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _steps(view: View) -> tuple[Steps, int]:
    """The jitters that change anything, in order, and how many of them precede contrast."""
    steps = [(name, getattr(view, name)) for name in view.order if getattr(view, name) != 1.0]
    names = [name for name, _ in steps]
    return steps, names.index("contrast") if "contrast" in names else 0


def _jittered_crop(image: Image.Image, view: View) -> tuple[Image.Image, int]:
    """The crop of the jittered, flipped image, and the grey level about which contrast turned.

    All three jitters act on each pixel by itself, but for that level: the mean grey of the *full*
    image at that moment. So, where it is not known, the full image takes part in the steps before
    contrast, and in no others.
    """
    rows, columns = view.source_box(image.height, image.width)
    steps, on_full = _steps(view)
    pivot = view.grey_level or 0
    if view.sees_its_box_only:
        on_full = 0
    else:
        for name, factor in steps[:on_full]:
            image = jitter(image, name, factor, 0)
        pivot = mean_grey(image)
    crop = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    for name, factor in steps[on_full:]:
        crop = jitter(crop, name, factor, pivot)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else crop, pivot


def _resize_planes(planes: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    import torch

    return torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
