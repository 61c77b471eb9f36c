"""The paper that pictures are drawn on: fonts, colours, headings."""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

INK, FAINT, PAPER = (32, 36, 42), (118, 126, 136), (255, 255, 255)
FRAME, MASKED, CONTOUR = (214, 218, 224), (150, 156, 166), (230, 92, 30)
SERIES = ((38, 92, 180), (230, 92, 30), (40, 140, 90), (140, 80, 170), (120, 120, 120))
SCALE = 2
"""Pixels of a picture for each of its layout: legible on a projector."""
MARGIN, GAP = 18 * SCALE, 8 * SCALE
WIDE = 380 * SCALE


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own font, of a size in pixels of the layout."""
    return ImageFont.load_default(size * SCALE)


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


def new_canvas(
    width: int, height: int, title: str, note: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """White paper with a heading above `height` pixels of content, and where that begins.

    Wider than asked for where the title needs it; a note takes as many lines as it needs.
    """
    needed = max(text_width(title, 19), min(text_width(note, 13), WIDE))
    width = max(width, 2 * MARGIN + needed)
    lines = _lines(note, 13, width - 2 * MARGIN)
    below_title = MARGIN + (28 * SCALE if title else 0)
    top = below_title + 20 * SCALE * len(lines) + 4 * SCALE
    canvas = Image.new("RGB", (width, top + height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6 * SCALE), title, fill=INK, font=font(19))
    for row, line in enumerate(lines):
        y = below_title + (20 * row - 6) * SCALE
        draw.text((MARGIN, y), line, fill=FAINT, font=font(13))
    return canvas, draw, top


def _lines(text: str, size: int, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
