"""Encoded bytes and views to pixels: the one place where images of a table are decoded."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from beit.images import UnusableImage, decode_array, decode_image
from beit.views import (
    Interpolation,
    View,
    ViewPolicy,
    center_view,
    render_all,
    render_fast,
    render_sizes,
    sample_view,
)
from pipelines.errors import InputError
from pipelines.tables.image_table import ImageParts

ViewOf = Callable[[bytes, int, int], View]
"""Digest, height and width of an image to a view of it."""
Output = tuple[int, Interpolation | Literal["fast"]]
"""Side in pixels and filter; fast is `beit.views.render_fast`: for training, never for tokens."""

Source = TypeVar("Source", np.ndarray, Image.Image)


class DamagedImageError(InputError):
    """An image does not decode, which `prepare` has excluded: the table is damaged."""


def drawn(policy: ViewPolicy, index: int, grey_level: int | None = None) -> ViewOf:
    """View `index` by this policy; `grey_level` is `View.grey_level` where it is known."""

    def view_of(digest: bytes, height: int, width: int) -> View:
        view = sample_view(policy, digest, index, height, width)
        return replace(view, grey_level=grey_level)

    return view_of


def central(crop_fraction: float = 224 / 256) -> ViewOf:
    """The plain view for evaluation, see `beit.views.center_view`."""
    return lambda _, height, width: center_view(height, width, crop_fraction)


def render_encoded(
    data: bytes,
    digest: bytes,
    views: Sequence[ViewOf],
    outputs: Sequence[Output],
    *,
    key: str,
) -> list[np.ndarray]:
    """Every output of every view of one encoded image: uint8 (side, side, 3), view by view.

    The image is decoded once, and jittered and cropped once for all exact outputs of a view. The
    same bits wherever it runs. Raises `DamagedImageError`.
    """
    exact = [(side, kind) for side, kind in outputs if kind != "fast"]
    if len(exact) == len(outputs):
        return render_with_levels(data, digest, views, exact, key=key)[0]
    source, found = _decoded(decode_array, data, digest, views, key)
    rendered = []
    for view in found:
        sizes = iter(render_sizes(source, view, exact))
        for side, kind in outputs:
            rendered.append(render_fast(source, view, side) if kind == "fast" else next(sizes))
    return rendered


def render_with_levels(
    data: bytes,
    digest: bytes,
    views: Sequence[ViewOf],
    outputs: Sequence[tuple[int, Interpolation]],
    *,
    key: str,
) -> tuple[list[np.ndarray], list[int]]:
    """`render_encoded` of exact outputs, and the grey level of each view (`View.grey_level`)."""
    source, found = _decoded(decode_image, data, digest, views, key)
    rendered = [render_all(source, view, outputs) for view in found]
    return [pixels for sizes, _ in rendered for pixels in sizes], [level for _, level in rendered]


def _decoded(
    decode: Callable[[bytes], Source], data: bytes, digest: bytes, views: Sequence[ViewOf], key: str
) -> tuple[Source, list[View]]:
    """An image with its views, in the form its renderer works on: the other would cost a copy."""
    try:
        source = decode(data)
    except UnusableImage as error:
        raise DamagedImageError(
            f"image {key!r} of the image table does not decode ({error}): "
            "the table is damaged; run `beit audit`, then prepare it again"
        ) from error
    height, width = source.shape[:2] if isinstance(source, np.ndarray) else source.size[::-1]
    return source, [view_of(digest, height, width) for view_of in views]


def read_pixels(
    images: ImageParts,
    rows: np.ndarray,
    view_of: ViewOf,
    size: int,
    interpolation: Interpolation = "bicubic",
    *,
    batch_size: int = 64,
    num_threads: int = 1,
    damaged: dict[int, str] | None = None,
) -> Iterator[np.ndarray]:
    """A view of each of these rows (ascending), in batches: uint8 (batch_size, 3, size, size).

    The last batch may be smaller. Each row group is read once; memory holds one, and a batch. In
    `damaged` stands what is wrong with images that do not decode, by their positions in `rows`,
    before their batch comes; they are black.

    Raises:
        InputError: a part is missing or damaged, or an image in it and `damaged` is not given.
    """
    if (np.diff(rows) < 0).any():
        raise ValueError("rows: give them in ascending order")

    columns = ("key", "image", "digest")

    def one(position: int, key: str, image: bytes, digest: bytes) -> np.ndarray:
        try:
            pixels = render_encoded(image, digest, [view_of], [(size, interpolation)], key=key)[0]
        except DamagedImageError as error:
            if damaged is None:
                raise
            damaged[position] = str(error)
            pixels = np.zeros((size, size, 3), np.uint8)
        return pixels.transpose(2, 0, 1)

    batch = np.empty((min(batch_size, len(rows)), 3, size, size), np.uint8)
    filled, left = 0, len(rows)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        for positions, table in images.read_scattered(rows, columns):
            for start in range(0, table.num_rows, batch_size):
                some = table.slice(start, batch_size)
                places = positions[start : start + batch_size].tolist()
                for pixels in pool.map(one, places, *(some[name].to_pylist() for name in columns)):
                    batch[filled] = pixels
                    filled += 1
                    if filled == len(batch):
                        yield batch
                        left -= filled
                        batch, filled = np.empty_like(batch[:left]), 0
