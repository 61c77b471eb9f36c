"""The paper that pictures are drawn on: fonts, colours, headings."""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

INK, FAINT, PAPER = (32, 36, 42), (118, 126, 136), (255, 255, 255)
FRAME, MASKED, CONTOUR = (214, 218, 224), (150, 156, 166), (230, 92, 30)
SERIES = ((38, 92, 180), (230, 92, 30), (40, 140, 90), (140, 80, 170), (120, 120, 120))
MARGIN, GAP = 18, 8


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Pixels."""
    return int(np.ceil(font(size).getlength(text)))


def shortened(text: str, size: int, width: int) -> str:
    """`text` cut with an ellipsis to `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def heading_height(title: str, note: str) -> int:
    """Pixels above the content."""
    return MARGIN + (28 if title else 0) + (20 if note else 0) + 4


def new_canvas(
    width: int, height: int, title: str, note: str
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper with a heading; wider than asked for where the heading needs it."""
    needed = 2 * MARGIN + max(text_width(title, 19), text_width(note, 13))
    canvas = Image.new("RGB", (max(width, needed), height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), title, fill=INK, font=font(19))
    draw.text((MARGIN, MARGIN + 22), note, fill=FAINT, font=font(13))
    return canvas, draw
