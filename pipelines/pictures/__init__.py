"""Pictures of what pretraining sees and does: arrays in, Pillow images out.

Image batches are uint8 (B, 3, H, W), arrays or CPU tensors; masks are bool (B, N), row-major over
the grid of patches. Every picture carries its own title and legend, so that it explains itself in
a list of artefacts.
"""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.pictures.canvas import (
    CONTOUR,
    FAINT,
    FRAME,
    GAP,
    INK,
    MARGIN,
    MASKED,
    SCALE,
    font,
    new_canvas,
    shortened,
)
from pipelines.pictures.plots import bars, codebook_usage, confusion, curve, forest

__all__ = [
    "bars",
    "codebook_usage",
    "confusion",
    "contact_sheet",
    "curve",
    "forest",
    "masked_input_grid",
    "painted_grid",
    "png",
    "reconstruction_grid",
    "token_map",
    "tokenizer_grid",
]

TILE, SMALL_TILE = 128 * SCALE, 96 * SCALE
MAX_IMAGES = 8
"""Of a batch that are shown, one below the other."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a grid of tiles."""

    title: str
    tiles: Sequence[Image.Image]


def masked_input_grid(
    images: Any, mask: Any, *, patch_size: int, title: str = "What the encoder sees"
) -> Image.Image:
    """Each image beside itself with its masked patches greyed out.

    Args:
        images: uint8 (B, 3, H, W).
        mask: bool (B, N), True = masked.
        patch_size: pixels.
        title: heading.
    """
    columns, masks = _inputs(images, mask, patch_size)
    note = f"{_share(masks)} are masked (grey); the model predicts their visual tokens"
    return _sheet(columns, title=title, note=note, groups=2 if len(masks) > 3 else 1)


def painted_grid(
    images: Any,
    mask: Any,
    painted: Any,
    *,
    patch_size: int,
    title: str = "Pixels: true and painted",
) -> Image.Image:
    """Input, masked input, and the input with masked patches as the model paints them.

    Args:
        images: uint8 (B, 3, H, W).
        mask: bool (B, N), True = masked.
        painted: uint8 (B, 3, H, W).
        patch_size: pixels.
        title: heading.
    """
    columns, masks = _inputs(images, mask, patch_size)
    tiles = [_tile(array) for array in _as_images(painted)[:MAX_IMAGES]]
    note = f"{_share(masks)} are masked (grey) and painted from the rest"
    return _sheet([*columns, Column(title="painted", tiles=tiles)], title=title, note=note)


def reconstruction_grid(
    images: Any,
    mask: Any,
    decoded_true: Any,
    decoded_predicted: Any,
    *,
    patch_size: int,
    accuracy: Sequence[float] | None = None,
    title: str = "Visual tokens: true and predicted",
) -> Image.Image:
    """Input, masked input, the true tokens decoded, and the predicted tokens decoded.

    Args:
        images: uint8 (B, 3, H, W), the view for the encoder.
        mask: bool (B, N), True = masked.
        decoded_true: uint8 (B, 3, h, w), the tokenizer's picture of the true tokens.
        decoded_predicted: uint8 (B, 3, h, w), its picture of the predicted tokens at masked
            patches with the true tokens elsewhere.
        patch_size: pixels, of `images`.
        accuracy: share of masked tokens predicted exactly, per image.
        title: heading.
    """
    columns, masks = _inputs(images, mask, patch_size)
    size = columns[0].tiles[0].size if len(masks) else (TILE, TILE)
    true, predicted = (
        [_tile(array, size=size) for array in _as_images(decoded)[:MAX_IMAGES]]
        for decoded in (decoded_true, decoded_predicted)
    )
    captions = None
    if accuracy is not None:
        captions = [f"{100 * value:.0f} %" for value in list(accuracy)[:MAX_IMAGES]]
    columns += [
        Column(title="true tokens", tiles=true),
        Column(
            title="predicted tokens",
            tiles=[
                _with_contour(tile, cells) for tile, cells in zip(predicted, masks, strict=True)
            ],
        ),
    ]
    note = "inside the orange line: predicted from the rest; outside: true tokens"
    if accuracy:
        mean = 100 * float(np.mean(accuracy))
        note += f". Masked tokens predicted exactly: {mean:.0f} % in {len(accuracy)} images"
    return _sheet(columns, title=title, note=note, captions=captions, caption_title="exact")


def tokenizer_grid(
    images: Any,
    decoded: Any,
    *,
    title: str = "Tokenizer: pictures through the codebook",
    note: str = "decoded from token ids alone",
) -> Image.Image:
    """Pictures beside what their visual tokens stand for, both uint8 (B, 3, h, w)."""
    arrays, found = (_as_images(each)[: 2 * MAX_IMAGES] for each in (images, decoded))
    size = _tile(arrays[0]).size if len(arrays) else (TILE, TILE)
    columns = [
        Column(title="input", tiles=[_tile(array, size=size) for array in arrays]),
        Column(title="tokens", tiles=[_tile(array, size=size) for array in found]),
    ]
    return _sheet(columns, title=title, note=note, groups=2 if len(arrays) > 3 else 1)


def token_map(
    token_ids: Any,
    *,
    grid_size: tuple[int, int],
    images: Any = None,
    title: str = "Visual tokens",
) -> Image.Image:
    """Token ids as colours: equal colour, equal token. For tokenizers without a decoder.

    Args:
        token_ids: int (B, N).
        grid_size: rows and columns of the token grid.
        images: uint8 (B, 3, H, W) shown beside the tokens.
        title: heading.
    """
    ids = np.asarray(token_ids)[:MAX_IMAGES].reshape(-1, *grid_size)
    palette = {int(value): _token_colour(int(value)) for value in np.unique(ids)}
    grids = np.zeros((*ids.shape, 3), np.uint8)
    for value, colour in palette.items():
        grids[ids == value] = colour
    columns = []
    if images is not None:
        tiles = [_tile(array) for array in _as_images(images)[:MAX_IMAGES]]
        columns.append(Column(title="input", tiles=tiles))
    size = columns[0].tiles[0].size if columns and len(ids) else (TILE, TILE)
    columns.append(Column(title="token ids", tiles=[_tile(grid, size=size) for grid in grids]))
    note = f"{len(palette)} different tokens; equal colour = equal token"
    return _sheet(columns, title=title, note=note, groups=2 if len(ids) > 3 else 1)


def contact_sheet(
    images: Any,
    *,
    labels: Sequence[str] | None = None,
    columns: int = 8,
    title: str = "Images",
    note: str = "",
) -> Image.Image:
    """Pictures in rows, uint8 (B, 3, H, W) or a list of (3, H, W), each with a label below."""
    side = SMALL_TILE
    tiles = [_fitted(array, side) for image in images for array in _as_images(image[None])]
    line = side + (18 * SCALE if labels else 0) + GAP
    rows = -(-len(tiles) // columns) if tiles else 0
    width = 2 * MARGIN + columns * side + (columns - 1) * GAP
    canvas, draw, top = new_canvas(width, rows * line, title, note)
    for index, tile in enumerate(tiles):
        x = MARGIN + index % columns * (side + GAP)
        y = top + index // columns * line
        canvas.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        if labels:
            text, below = shortened(str(labels[index]), 11, side), y + side + 3 * SCALE
            draw.text((x + side // 2, below), text, fill=FAINT, font=font(11), anchor="ma")
    return canvas


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# Tiles and sheets


def _inputs(images: Any, mask: Any, patch_size: int) -> tuple[list[Column], np.ndarray]:
    """Columns of the images and of the same with masked patches grey, and bool (B, rows, columns):
    which those are."""
    arrays = _as_images(images)[:MAX_IMAGES]
    masks = _as_grid(mask, arrays, patch_size)[:MAX_IMAGES]
    hidden = [_tile(_masked(*pair)) for pair in zip(arrays, masks, strict=True)]
    return [
        Column(title="input", tiles=[_tile(array) for array in arrays]),
        Column(title="masked input", tiles=hidden),
    ], masks


def _share(masks: np.ndarray) -> str:
    return f"{100 * float(masks.mean()) if len(masks) else 0:.0f} % of the patches"


def _as_images(images: Any) -> np.ndarray:
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3:
        raise ValueError(f"images are {array.dtype} {array.shape}; pass uint8 (B, 3, H, W)")
    return array.transpose(0, 2, 3, 1)


def _as_grid(mask: Any, images: np.ndarray, patch_size: int) -> np.ndarray:
    rows, columns = images.shape[1] // patch_size, images.shape[2] // patch_size
    array = np.asarray(mask, dtype=np.bool_)
    if array.size != len(array) * rows * columns:
        raise ValueError(
            f"mask has shape {array.shape}; {rows}x{columns} patches of {patch_size} pixels need "
            f"(B, {rows * columns})"
        )
    return array.reshape(-1, rows, columns)


def _masked(array: np.ndarray, cells: np.ndarray) -> np.ndarray:
    height, width = array.shape[0] // cells.shape[0], array.shape[1] // cells.shape[1]
    hidden = cells.repeat(height, 0).repeat(width, 1)[..., None]
    return np.where(hidden, np.array(MASKED, np.uint8), array)


def _tile(array: np.ndarray, size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(array))
    if size is None:
        # Whole multiples keep pixels square: 224 of them, too, are doubled.
        factor = -(-TILE // max(image.size))
        size = (image.width * factor, image.height * factor)
    if image.size == size:
        return image
    enlarged = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _fitted(array: np.ndarray, side: int) -> Image.Image:
    """The picture in its own shape, its longer side as given."""
    height, width = array.shape[:2]
    scale = side / max(height, width)
    return _tile(array, size=(max(1, round(width * scale)), max(1, round(height * scale))))


def _with_contour(tile: Image.Image, cells: np.ndarray) -> Image.Image:
    draw = ImageDraw.Draw(tile)
    height, width = tile.height / cells.shape[0], tile.width / cells.shape[1]
    padded = np.pad(cells, 1)
    for row in range(cells.shape[0] + 1):
        for column in range(cells.shape[1] + 1):
            here = padded[row + 1, column + 1]
            x, y = round(column * width), round(row * height)
            if here != padded[row, column + 1]:
                draw.line((x, y, round((column + 1) * width), y), fill=CONTOUR, width=2 * SCALE)
            if here != padded[row + 1, column]:
                draw.line((x, y, x, round((row + 1) * height)), fill=CONTOUR, width=2 * SCALE)
    return tile


def _token_colour(value: int) -> tuple[int, int, int]:
    # Golden-ratio steps in hue keep neighbouring ids apart; three rings of brightness.
    hue = value * 0.61803398875 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.45, 0.9)[value % 3], 0.92)
    return round(255 * red), round(255 * green), round(255 * blue)


def _sheet(
    columns: Sequence[Column],
    *,
    title: str,
    note: str,
    captions: Sequence[str] | None = None,
    caption_title: str = "",
    groups: int = 1,
) -> Image.Image:
    # `groups` sets of the columns stand side by side, so that many rows do not make a tower.
    count = len(columns[0].tiles)
    rows = max(1, -(-count // groups))
    tile_width = max((tile.width for c in columns for tile in c.tiles), default=TILE)
    tile_height = max((tile.height for c in columns for tile in c.tiles), default=TILE)
    group_width = len(columns) * (tile_width + GAP) + (20 * SCALE if groups > 1 else 0)
    caption_width, titles = 56 * SCALE if captions else 0, 22 * SCALE
    canvas, draw, top = new_canvas(
        2 * MARGIN + groups * group_width + caption_width,
        titles + rows * (tile_height + GAP) - GAP,
        title,
        note,
    )
    for group in range(min(groups, -(-count // rows)) if count else 0):
        for column_index, column in enumerate(columns):
            x = MARGIN + group * group_width + column_index * (tile_width + GAP)
            draw.text((x, top), shortened(column.title, 13, tile_width), fill=INK, font=font(13))
            for row, tile in enumerate(column.tiles[group * rows : (group + 1) * rows]):
                y = top + titles + row * (tile_height + GAP)
                canvas.paste(tile, (x, y))
                draw.rectangle((x, y, x + tile.width - 1, y + tile.height - 1), outline=FRAME)
    x = MARGIN + len(columns) * (tile_width + GAP) + 4 * SCALE
    if captions:
        draw.text((x, top), caption_title, fill=INK, font=font(13))
    for row, caption in enumerate(captions or ()):
        y = top + titles + row * (tile_height + GAP) + tile_height // 2
        draw.text((x, y), caption, fill=INK, font=font(14), anchor="lm")
    return canvas
