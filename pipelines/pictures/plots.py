"""Plots without a plotting library: codebook usage, curves, confusion. Arrays in, pictures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.pictures.canvas import (
    FAINT,
    FRAME,
    INK,
    MARGIN,
    PAPER,
    SERIES,
    font,
    heading_height,
    new_canvas,
    shortened,
    text_width,
)


def codebook_usage(counts: Any, *, title: str = "Codebook usage") -> Image.Image:
    """How often each token occurs, most frequent first, on a logarithmic axis.

    Args:
        counts: int (vocab_size,), occurrences of every token.
        title: heading.
    """
    values = np.sort(np.asarray(counts, dtype=np.float64))[::-1]
    used, total = int((values > 0).sum()), max(values.sum(), 1.0)
    shares = values[values > 0] / total
    perplexity = float(np.exp(-(shares * np.log(shares)).sum())) if used else 0.0
    note = (
        f"{used} of {len(values)} tokens used, perplexity {perplexity:.1f}; "
        f"the most frequent makes {100 * shares[0] if used else 0:.1f} %"
    )
    plot = _Plot(title, note, x_label="token, by frequency", y_label="occurrences")
    top = 10 ** np.ceil(np.log10(max(values[0] if len(values) else 1, 10)))
    plot.axes((0, len(values)), (0.8, top), log_y=True)
    for index, value in enumerate(values):
        if value > 0:
            left, right = plot.x(index), plot.x(index + 1)
            gap = 1 if right - left > 4 else 0
            box = (left, plot.y(value), max(left, right - 1 - gap), plot.bottom)
            plot.draw.rectangle(box, fill=SERIES[0])
    return plot.canvas


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    note: str = "",
) -> Image.Image:
    """Lines over steps; `series` maps a name to its x and y values."""
    plot = _Plot(title, note, x_label=x_label, y_label=y_label)
    every_x = [float(x) for xs, _ in series.values() for x in xs]
    every_y = [float(y) for _, ys in series.values() for y in ys if np.isfinite(y)]
    plot.axes(_span(every_x), _span(every_y))
    for index, (name, (xs, ys)) in enumerate(series.items()):
        colour = SERIES[index % len(SERIES)]
        points = [(plot.x(x), plot.y(y)) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        if len(points) > 1:
            plot.draw.line(points, fill=colour, width=2, joint="curve")
        for x, y in points if len(points) <= 30 else ():
            plot.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        plot.legend(index, name, colour)
    return plot.canvas


def confusion(
    matrix: Any, class_names: Sequence[str], *, title: str = "Confusion", note: str = ""
) -> Image.Image:
    """Rows: the true class; columns: the predicted one; cells: share of the row and count.

    Args:
        matrix: int (C, C), counts.
        class_names: C names.
        title: heading.
        note: line below the heading.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    cell = 58 if len(counts) <= 12 else 24
    names = [shortened(name, 13, 170) for name in class_names]
    left = MARGIN + max((text_width(name, 13) for name in names), default=0) + 10
    # Column names are written upwards, since they are longer than a cell is wide.
    head = max((text_width(name, 13) for name in names), default=0) + 34
    top = heading_height(title, note) + head
    size = cell * len(counts)
    canvas, draw = new_canvas(max(left + size + MARGIN, 520), top + size + MARGIN, title, note)
    draw.text((left, top - head + 2), "predicted", fill=FAINT, font=font(12))
    for row, name in enumerate(names):
        middle = top + row * cell + cell // 2
        draw.text((left - 8, middle), name, fill=INK, font=font(13), anchor="rm")
        label = Image.new("RGB", (head, 20), PAPER)
        ImageDraw.Draw(label).text((0, 10), name, fill=INK, font=font(13), anchor="lm")
        upright = label.rotate(90, expand=True)
        area = (0, 18, 20, head)
        canvas.paste(upright.crop(area), (left + row * cell + cell // 2 - 10, top - head + 18 - 4))
        total = max(int(counts[row].sum()), 1)
        for column, count in enumerate(counts[row]):
            share = count / total
            x, y = left + column * cell, top + row * cell
            target = np.array(SERIES[0] if row == column else SERIES[1])
            colour = tuple(int(v) for v in 255 + (target - 255) * min(1.0, share) ** 0.7)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            if cell >= 40 and count:
                ink = PAPER if share > 0.55 else INK
                centre = (x + cell // 2, y + cell // 2)
                draw.text((centre[0], centre[1] - 7), f"{100 * share:.0f} %", fill=ink,
                          font=font(14), anchor="mm")  # fmt: skip
                draw.text((centre[0], centre[1] + 10), str(count), fill=ink, font=font(11),
                          anchor="mm")  # fmt: skip
    return canvas


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


class _Plot:
    """Axes on a canvas of fixed size; `x` and `y` turn values into pixels."""

    def __init__(self, title: str, note: str, *, x_label: str, y_label: str) -> None:
        self.canvas, self.draw = new_canvas(760, 420, title, note)
        self.left, self.right = 84, self.canvas.width - 28
        self.top, self.bottom = heading_height(title, note) + 24, self.canvas.height - 52
        self.x_label, self.y_label = x_label, y_label

    def axes(
        self, x_span: tuple[float, float], y_span: tuple[float, float], *, log_y: bool = False
    ) -> None:
        """Draws frame, ticks and labels."""
        self.x_span, self.y_span, self.log_y = x_span, y_span, log_y
        if log_y:
            low, high = np.log10(y_span)
            y_ticks = [10.0**power for power in range(int(np.ceil(low)), int(high) + 1)]
        else:
            y_ticks = _ticks(*y_span)
        for value in y_ticks:
            y = self.y(value)
            self.draw.line((self.left, y, self.right, y), fill=FRAME)
            self.draw.text((self.left - 8, y), _number(value), fill=FAINT, font=font(12),
                           anchor="rm")  # fmt: skip
        for value in _ticks(*x_span):
            x = self.x(value)
            self.draw.line((x, self.bottom, x, self.bottom + 4), fill=FAINT)
            self.draw.text((x, self.bottom + 8), _number(value), fill=FAINT, font=font(12),
                           anchor="ma")  # fmt: skip
        self.draw.line((self.left, self.bottom, self.right, self.bottom), fill=INK)
        middle = (self.left + self.right) // 2
        self.draw.text((middle, self.canvas.height - 12), self.x_label, fill=INK, font=font(13),
                       anchor="ms")  # fmt: skip
        self.draw.text((MARGIN, self.top - 12), self.y_label, fill=INK, font=font(13), anchor="ls")

    def x(self, value: float) -> int:
        low, high = self.x_span
        return round(self.left + (value - low) / (high - low) * (self.right - self.left))

    def y(self, value: float) -> int:
        low, high = np.log10(self.y_span) if self.log_y else self.y_span
        position = np.log10(max(value, 1e-30)) if self.log_y else value
        return round(self.bottom - (position - low) / (high - low) * (self.bottom - self.top))

    def legend(self, index: int, name: str, colour: tuple[int, int, int]) -> None:
        width, y = text_width(name, 13), self.top + 12 + 20 * index
        self.draw.line((self.right - width - 34, y, self.right - width - 12, y), fill=colour,
                       width=3)  # fmt: skip
        self.draw.text((self.right - 4, y), name, fill=INK, font=font(13), anchor="rm")


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10 ** np.floor(np.log10(raw))
    step = min((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw), default=10) * power
    first = int(np.ceil(low / step - 1e-9))
    return [index * step for index in range(first, int(np.floor(high / step + 1e-9)) + 1)]


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"
