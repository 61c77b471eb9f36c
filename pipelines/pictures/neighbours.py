"""What features find alike: nearest neighbours of images, and of a patch within its image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.pictures.canvas import (
    CONTOUR,
    FAINT,
    GAP,
    INK,
    MARGIN,
    SCALE,
    SERIES,
    font,
    new_canvas,
    shortened,
)

TILE = 96 * SCALE
RIGHT, WRONG = SERIES[2], SERIES[1]


def nearest_neighbours(
    images: Any,
    labels: Sequence[Sequence[str]],
    *,
    title: str,
    note: str,
) -> Image.Image:
    """Rows of an image and its neighbours, the nearest first; framed by whether the class agrees.

    Args:
        images: uint8 (rows, 1 + k, 3, H, W), the query first.
        labels: rows x (1 + k) names of classes.
        title: heading.
        note: line below the heading.
    """
    rows, columns = images.shape[:2]
    line = TILE + 18 * SCALE + GAP
    width = 2 * MARGIN + columns * (TILE + GAP) + GAP
    canvas, draw, top = new_canvas(width, rows * line, title, note)
    for row in range(rows):
        for column in range(columns):
            # A gap sets the query apart.
            x = MARGIN + column * (TILE + GAP) + (GAP if column else 0)
            y = top + row * line
            canvas.paste(_tile(images[row, column]), (x, y))
            agrees = labels[row][column] == labels[row][0]
            colour = INK if not column else RIGHT if agrees else WRONG
            frame = (x - 2 * SCALE, y - 2 * SCALE, x + TILE + SCALE, y + TILE + SCALE)
            draw.rectangle(frame, outline=colour, width=3 * SCALE)
            name = shortened(labels[row][column], 11, TILE)
            draw.text(
                (x + TILE // 2, y + TILE + 3 * SCALE), name, fill=FAINT, font=font(11), anchor="ma"
            )
    return canvas


def patch_similarity(
    images: Any,
    patches: Any,
    grid_size: tuple[int, int],
    *,
    title: str,
    note: str,
) -> Image.Image:
    """Images, each with three of its patches and how like them (cosine) all others are.

    Args:
        images: uint8 (B, 3, H, W).
        patches: float (B, N, dim), features of the patches, row-major over the grid.
        grid_size: rows and columns of patches.
        title: heading.
        note: line below the heading.
    """
    rows, columns = grid_size
    queries = [(rows // 2, columns // 2), (rows // 4, columns // 4), (3 * rows // 4, columns // 2)]
    line = TILE + GAP
    width = 2 * MARGIN + (1 + len(queries)) * (TILE + GAP)
    canvas, _, top = new_canvas(width, len(images) * line, title, note)
    values = np.asarray(patches, np.float32)
    values = values - values.mean(axis=1, keepdims=True)
    values /= np.linalg.norm(values, axis=2, keepdims=True) + 1e-9
    for row, (image, features) in enumerate(zip(images, values, strict=True)):
        y = top + row * line
        canvas.paste(_tile(image), (MARGIN, y))
        for column, (up, across) in enumerate(queries, start=1):
            like = (features @ features[up * columns + across]).reshape(rows, columns)
            tile = _heat(like)
            ImageDraw.Draw(tile).rectangle(
                (
                    across * TILE // columns, up * TILE // rows,
                    (across + 1) * TILE // columns - 1, (up + 1) * TILE // rows - 1,
                ),
                outline=CONTOUR, width=2 * SCALE,
            )  # fmt: skip
            canvas.paste(tile, (MARGIN + column * (TILE + GAP), y))
    return canvas


def _heat(like: np.ndarray) -> Image.Image:
    # White: unlike (-1 or 0); blue: alike. The scale is the same in all tiles.
    share = np.clip(like, 0, 1)[..., None]
    colours = 255 + (np.array(SERIES[0]) - 255) * share
    return _resized(Image.fromarray(colours.astype(np.uint8)))


def _tile(array: np.ndarray) -> Image.Image:
    return _resized(Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))))


def _resized(image: Image.Image) -> Image.Image:
    larger = image.width <= TILE
    kind = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return image.resize((TILE, TILE), kind)
