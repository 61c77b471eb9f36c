"""Plots: codebook usage, curves, confusion. Arrays in, Pillow images out."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures.canvas import FAINT, FRAME, INK, SERIES, Colour

# Above this many classes names and figures would not be legible.
MAX_NAMED_CLASSES = 30
MAX_PAIRS = 30
MAX_LEGEND = 12
MAX_COUNTED_CLASSES = 12
MAX_NAME = 24
DPI = 200  # legible on a projector and on a screen of high density

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def codebook_usage(counts: Any, *, title: str = "Codebook usage") -> Image.Image:
    """How often each token occurs, most frequent first, on logarithmic axes, beside an even use.

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
        xlabel="token, by frequency", ylabel="occurrences", xscale="log", yscale="log",
        xlim=(1, len(values) + 1), ylim=(0.8, 1.5 * max(values.max(initial=0), 10)),
    )  # fmt: skip
    edges = np.arange(1, used + 2)
    axes.stairs(values[:used], edges, baseline=0.8, fill=True, color=_hex(SERIES[0]))
    even = total / len(values)
    axes.axhline(even, color=_hex(SERIES[1]), linewidth=1, dashes=(4, 2), label="all alike")
    _legend(figure, axes)
    return _drawn(figure)


def curve(
    series: Series,
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    note: str = "",
    bands: Series | None = None,
    levels: Mapping[str, tuple[float, int]] | None = None,
    least_span: float = 0.0,
) -> Image.Image:
    """Lines over steps.

    Args:
        series: name -> x and y values.
        title: heading.
        x_label: what x counts.
        y_label: what y is.
        note: line below the heading.
        bands: name of a series -> lower and upper ends of the intervals of its values.
        levels: name -> value that a dashed line marks, such as a baseline, and the number of the
            series whose colour it has.
        least_span: the y axis shows no less than this, so that noise does not fill it.
    """
    figure, axes = _curves(series, title, x_label, y_label, note)
    for index, name in enumerate(series):
        if bands and name in bands:
            colour = _hex(SERIES[index % len(SERIES)])
            axes.fill_between(series[name][0], *bands[name], color=colour, alpha=0.15, lw=0)
    for index, (name, (value, of_series)) in enumerate((levels or {}).items()):
        colour = _hex(SERIES[of_series % len(SERIES)])
        axes.axhline(value, label=name, color=colour, linewidth=1, dashes=(4, 2 + 2 * index))
    low, high = axes.get_ylim()
    missing = max(0.0, least_span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    _legend(figure, axes)
    return _drawn(figure)


def curve_svg(series: Series, *, title: str, kinds: Mapping[str, str] | None) -> str:
    """The same as an SVG element, of any number of lines; a legend only where it can be read.

    `title` also says what y is. `kinds` names what the lines of one colour have in common, by name
    of the series; each line has a colour of its own without. Those after the first four are all
    grey.
    """
    figure, axes = _curves(series, title, "step", title, "")
    if kinds:
        _colour_kinds(axes, [kinds[name] for name in series], list(dict.fromkeys(kinds.values())))
    if len(axes.get_legend_handles_labels()[1]) <= MAX_LEGEND:
        _legend(figure, axes)
    return _svg(figure)


def _colour_kinds(axes: Any, kind_of_lines: Sequence[str], kinds: Sequence[str]) -> None:
    last = len(SERIES) - 1
    for line, kind in zip(list(axes.lines), kind_of_lines, strict=True):
        index = min(kinds.index(kind), last)
        line.set(color=_hex(SERIES[index]), linewidth=0.8, zorder=3 - index / 10, label="")
    more = len(kinds) > len(SERIES)
    named = [*kinds[:last], f"{len(kinds) - last} others"] if more else kinds
    for index, kind in enumerate(named):
        axes.plot([], [], label=kind, color=_hex(SERIES[index]))


Interval = tuple[str, float, float, float]


def forest(rows: Sequence[Interval], *, title: str, x_label: str) -> Image.Image:
    """Differences and their intervals, one below the other: (name, value, low, high)."""
    return _drawn(_forest(rows, title, x_label))


def forest_svg(rows: Sequence[Interval], *, title: str, x_label: str) -> str:
    """The same as an SVG element."""
    return _svg(_forest(rows, title, x_label))


def _forest(rows: Sequence[Interval], title: str, x_label: str) -> Any:
    figure, axes = _plot(title, "", size=(7.6, 1.6 + 0.3 * len(rows)))
    axes.grid(axis="x", color=_hex(FRAME))
    axes.axvline(0, color=_hex(INK), linewidth=1)
    for row, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [row, row], color=_hex(SERIES[0]), linewidth=2)
        axes.plot([value], [row], "o", color=_hex(SERIES[0]))
    axes.set_yticks(range(len(rows)), [_short(name, 60) for name, *_ in rows], parse_math=False)
    axes.set(xlabel=x_label, ylim=(len(rows) - 0.5, -0.5))
    return figure


def bars(shares: Mapping[str, float], *, title: str, x_label: str, note: str) -> Image.Image:
    """A bar for every name, the largest first."""
    order = sorted(shares, key=lambda name: -shares[name])
    figure, axes = _plot(title, note, size=(7.6, 1.6 + 0.3 * len(order)))
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=_hex(FRAME))
    axes.barh(range(len(order)), [shares[name] for name in order], color=_hex(SERIES[0]))
    axes.set_yticks(range(len(order)), order, parse_math=False)
    axes.set(xlabel=x_label, ylim=(len(order) - 0.5, -0.5))
    return _drawn(figure)


def _curves(series: Series, title: str, x_label: str, y_label: str, note: str) -> tuple[Any, Any]:
    figure, axes = _plot(title, note)
    axes.set(xlabel=x_label, ylabel=y_label)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=name, linewidth=1.5,
            color=_hex(SERIES[index % len(SERIES)]), marker="o" if len(points) <= 30 else "",
            markersize=3.5,
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)  # steps and blocks are whole
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes: never on the data."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        figure.legend(
            handles, [_short(name, 70) for name in names], loc="outside lower left",
            frameon=False, fontsize=9, ncols=1 if max(map(len, names)) > 30 else 2,
        )  # fmt: skip


def confusion(
    matrix: Any, class_names: Sequence[str], *, title: str = "Confusion", note: str = ""
) -> Image.Image:
    """Rows: the true class; columns: the predicted one; cells: share of the row and count.

    Of more classes than can be read so, the pairs that are confused most often.

    Args:
        matrix: int (C, C), counts.
        class_names: C names.
        title: heading.
        note: line below the heading.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    if len(counts) > MAX_NAMED_CLASSES:
        return _worst_pairs(counts, class_names, title, note)
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
    names = [_short(name, MAX_NAME) for name in class_names]
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


def _worst_pairs(
    counts: np.ndarray, class_names: Sequence[str], title: str, note: str
) -> Image.Image:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:MAX_PAIRS]
    pairs = [(*divmod(int(i), len(counts)), int(wrong.flat[i])) for i in order if wrong.flat[i]]
    heading = f"{title}: the most frequent errors of {len(counts)} classes"
    figure, axes = _plot(heading, note, size=(7.6, 1.6 + 0.24 * max(len(pairs), 1)))
    axes.grid(axis="x", color=_hex(FRAME))
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=_hex(SERIES[1]))
    for row, (true, _, count) in enumerate(pairs):
        share = f" {count} of {counts[true].sum()}"
        axes.text(count, row, share, va="center", fontsize=8, color=_hex(INK))
    names = [
        f"{_short(class_names[true], MAX_NAME)} as {_short(class_names[found], MAX_NAME)}"
        for true, found, _ in pairs
    ]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="test images", ylim=(max(len(pairs), 1) - 0.5, -0.5))
    return _drawn(figure)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _plot(title: str, note: str, *, size: tuple[float, float] = (7.6, 4.2)) -> tuple[Any, Any]:
    """A figure of its own, known to nobody else, and its axes; the size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, compress=True)
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


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Text stays text: it can be searched, and the file says the same each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "beit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
