"""Plots of the evidence; equal results make equal files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.cells import Cell, Experiment, of_baselines
from benchmarks.evidence.findings import Results, against, hits_of, of, over_baseline
from benchmarks.evidence.statistics import Estimate, accuracy

BASELINES = {"random_init": "random initialisation", "pixels": "raw pixels"}
BLUE, GREY = "#28527a", "#8a8a8a"


def label(experiment: Experiment, setting: Cell) -> str:
    """A setting in the words in which it differs."""
    values = [getattr(setting, name) for name in experiment.axis]
    words = " ".join(str(value) or "pixels" for value in values)
    return f"{experiment.axis[0]} {words}" if len(values) == 1 else words


def of_settings(experiment: Experiment, results: Results, path: Path) -> bool:
    """Each setting's probe with its interval; False, and no file, before two have results."""
    rows = [
        (setting, accuracy(hits_of(found)))
        for setting in experiment.settings
        if (found := of(setting, results))
    ]
    if len(rows) < 2:
        return False
    rows.sort(key=lambda row: [getattr(row[0], name) for name in experiment.axis])
    figure = Figure(figsize=(7, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    _intervals(axes, [label(experiment, setting) for setting, _ in rows], [row[1] for row in rows])
    tuned = experiment.settings[0].tuned
    beside = {} if tuned else of(of_baselines(experiment.settings[0].data, 0), results)
    for (name, title), style in zip(BASELINES.items(), (":", "--"), strict=True):
        found = [
            cell["scores"][name]["linear"] for cell in beside.values() if name in cell["scores"]
        ]
        if found:
            axes.axvline(100 * float(np.mean(found)), color=GREY, linestyle=style, label=title)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(fontsize="small", loc="outside lower center", ncols=len(BASELINES))
    measured = "test accuracy" if tuned else "linear probe"
    axes.set_xlabel(f"{measured}, %, with 95 % intervals")
    axes.set_title(experiment.title)
    least, most = axes.get_xlim()
    if most - least < 10:  # noise must not fill the page
        axes.set_xlim((least + most) / 2 - 5, (least + most) / 2 + 5)
    _save(figure, path)
    return True


def of_gains(
    settings: Sequence[tuple[Experiment, Cell]], results: Results, path: Path | None
) -> bool:
    """Points of each setting over raw pixels, or of what was fine-tuned over untrained networks.

    False where not two of them have any. Without a path nothing is drawn.
    """
    rows = [
        (f"{experiment.title}: {label(experiment, setting)}", gain)
        for experiment, setting in settings
        if (
            gain := against(setting, experiment.settings[0], results)
            if setting.tuned
            else over_baseline(setting, "pixels", results)
        )
    ]
    if len(rows) < 2:
        return False
    if path is not None:
        figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        _intervals(axes, [name for name, _ in rows[::-1]], [gain for _, gain in rows[::-1]])
        axes.axvline(0, color=GREY, linestyle="--")
        axes.set_xlabel(
            "points over raw pixels, fine-tuned over an untrained network;\n95 % intervals"
        )
        _save(figure, path)
    return True


def _intervals(axes: Axes, names: Sequence[str], found: Sequence[Estimate]) -> None:
    means = [estimate.mean for estimate in found]
    errors = [
        [estimate.mean - estimate.low for estimate in found],
        [estimate.high - estimate.mean for estimate in found],
    ]
    axes.errorbar(means, range(len(found)), xerr=errors, fmt="o", capsize=3, color=BLUE)
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(axis="x", alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
