"""Plots: codebook usage, curves, confusion. Arrays in, Pillow images out."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures.canvas import FAINT, FRAME, INK, SERIES, Colour

# Above this many classes names and figures would not be legible.
MAX_NAMED_CLASSES = 50
MAX_COUNTED_CLASSES = 12
MAX_NAME = 24
DPI = 100


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
    figure, axes = _plot(title, note)
    axes.set(
        xlabel="token, by frequency", ylabel="occurrences", yscale="log", xlim=(0, len(values)),
        ylim=(0.8, 1.5 * max(values.max(initial=0), 10)),
    )  # fmt: skip
    axes.stairs(values[:used], baseline=0.8, fill=True, color=_hex(SERIES[0]))
    return _drawn(figure)


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    note: str = "",
) -> Image.Image:
    """Lines over steps; `series` maps a name to its x and y values."""
    figure, axes = _plot(title, note)
    axes.set(xlabel=x_label, ylabel=y_label)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=name, linewidth=1.5,
            color=_hex(SERIES[index % len(SERIES)]), marker="o" if len(points) <= 30 else "",
            markersize=3.5,
        )  # fmt: skip
    if series:
        axes.legend(frameon=False)
    return _drawn(figure)


def confusion(
    matrix: Any, class_names: Sequence[str], *, title: str = "Confusion", note: str = ""
) -> Image.Image:
    """Rows: the true class; columns: the predicted one; cells: share of the row and count.

    Args:
        matrix: int (C, C), counts.
        class_names: C names; they are written where the classes are few enough to be legible.
        title: heading.
        note: line below the heading.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # White where nothing is; the right answers in one colour, the wrong ones in another.
    right = np.eye(len(counts), dtype=bool)[..., None]
    colours = np.where(right, SERIES[0], SERIES[1])
    cells = 255 + (colours - 255) * shares[..., None] ** 0.7
    side = min(9.0, 2.4 + (0.62 if len(counts) <= MAX_COUNTED_CLASSES else 0.24) * len(counts))
    figure, axes = _plot(title, note, size=(max(side, 5.2), side))
    axes.imshow(cells.astype(np.uint8), interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if len(counts) > MAX_NAMED_CLASSES:
        axes.set(xticks=[], yticks=[])
        return _drawn(figure)
    names = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in class_names]
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(counts) <= MAX_COUNTED_CLASSES:
        for row, column in zip(*counts.nonzero(), strict=True):
            share = shares[row, column]
            axes.text(
                column, row, f"{100 * share:.0f} %\n{counts[row, column]}", fontsize=8,
                ha="center", va="center", color="white" if share > 0.55 else _hex(INK),
            )  # fmt: skip
    return _drawn(figure)


def _plot(title: str, note: str, *, size: tuple[float, float] = (7.6, 4.2)) -> tuple[Any, Any]:
    """A figure of its own, known to nobody else, and its axes; the size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=size, dpi=DPI, layout=layout, facecolor="white")
    figure.suptitle(title, x=0.02, ha="left", fontsize=14, color=_hex(INK), parse_math=False)
    axes = figure.add_subplot()
    axes.set_title(note, loc="left", fontsize=9, color=_hex(FAINT), wrap=True, parse_math=False)
    axes.grid(axis="y", color=_hex(FRAME))
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(labelsize=9, color=_hex(FAINT), labelcolor=_hex(INK))
    return figure, axes


def _drawn(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A name in a script that the font has not: boxes say it as well.
        warnings.filterwarnings("ignore", message="Glyph")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
