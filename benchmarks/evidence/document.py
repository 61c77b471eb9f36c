"""docs/evidence.md and its plots, from the results alone."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence.cells import SEEDS, Cell, Experiment, experiments, of_baselines
from benchmarks.evidence.statistics import Estimate, accuracy, difference

Results = dict[str, Any]
MARGIN = -1.0
"""Points that fewer views may cost."""
INTRODUCTION = """# Evidence

What stored tokens are worth, measured with the product's own stages. How, and what was decided
before the first result: [benchmarks/evidence/protocol.md](../benchmarks/evidence/protocol.md).
Figures: [benchmarks/results/evidence.json](../benchmarks/results/evidence.json); this page is
written from them by `make evidence`, which runs what is still *open* and goes on where it was
killed.

Intervals are 95 %, of a bootstrap over seeds and images both; differences are paired with the first
row. Three seeds that are drawn with replacement vary by two thirds of what they should: where seeds
differ more than images, intervals are too narrow.
"""


def write(path: Path, results: Results) -> None:
    """The page and, beside it, its plots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = [INTRODUCTION]
    for experiment in experiments():
        sections.append(section(experiment, results))
        if drawn := plot(experiment, results):
            pictures = path.parent / "pictures"
            pictures.mkdir(exist_ok=True)
            file = pictures / f"evidence-{experiment.name}.svg"
            with mpl.rc_context({"svg.hashsalt": experiment.name}):  # equal results, equal files
                drawn.savefig(file, metadata={"Date": None})
            sections.append(f"![{experiment.title}](pictures/evidence-{experiment.name}.svg)\n")
        if experiment.name == "views-long":
            sections.append(rule(results))
    sections.append(origins(results))
    path.write_text("\n".join(sections))


def front(results: Results) -> str:
    """README's part: the first experiment, as table and plot."""
    experiment = experiments()[0]
    if not any(_of(setting, results) for setting in experiment.settings):
        return f"{experiment.title}: open, no cell of it was run yet."
    parts = [
        f"{experiment.title}, with 95 % intervals over seeds and images:",
        table(experiment, results),
    ]
    if plot(experiment, results) is not None:
        parts.append(f"![{experiment.title}](docs/pictures/evidence-{experiment.name}.svg)")
    return "\n\n".join([*parts, rule(results).strip()])


def section(experiment: Experiment, results: Results) -> str:
    """Heading and table."""
    return f"## {experiment.title}\n\n{table(experiment, results)}\n"


def table(experiment: Experiment, results: Results) -> str:
    """A row for each setting; one without any result says so."""
    lines = [
        f"| {' | '.join(experiment.axis)} | seeds | linear probe | against the first row "
        "| against raw pixels | k-NN | held-out loss | images seen | training |",
        "| --- " * (len(experiment.axis) + 8) + "|",
    ]
    for setting in experiment.settings:
        axis = " | ".join(str(getattr(setting, name)) or "pixels" for name in experiment.axis)
        lines.append(f"| {axis} | {_row(setting, experiment.settings[0], results)} |")
    return "\n".join([*lines, *_baselines(experiment, results)])


def _row(setting: Cell, reference: Cell, results: Results) -> str:
    found = _of(setting, results)
    if not found:
        return "open | | | | | | |"
    paired = against(setting, reference, results)
    gain = over_baseline(setting, "pixels", results)
    knn = np.mean([cell["scores"]["pretrained"]["knn"] for cell in found.values()])
    loss = np.mean([cell["held_out_loss"] for cell in found.values()])
    seconds = np.median([cell["training_seconds"] for cell in found.values()])
    count = str(len(found)) if len(found) == len(SEEDS) else f"{len(found)} of {len(SEEDS)}"
    images = next(iter(found.values()))["images_seen"]
    return (
        f"{count} | {_percent(accuracy(_hits(found)))} | {_points(paired)} | {_points(gain)} | "
        f"{100 * knn:.1f} % | {loss:.3f} | {images:,} | {seconds:.0f} s"
    )


def _baselines(experiment: Experiment, results: Results) -> list[str]:
    """Random initialisation and raw pixels of the same images, where they were measured."""
    lines = []
    found = _of(of_baselines(experiment.settings[0].data, 0), results)
    for name, title in (("random_init", "random initialisation"), ("pixels", "raw pixels")):
        values = [cell["scores"][name] for cell in found.values() if name in cell["scores"]]
        if values and any(_of(setting, results) for setting in experiment.settings):
            linear, knn = (100 * np.mean([v[probe] for v in values]) for probe in ("linear", "knn"))
            blank = " | " * (len(experiment.axis) - 1)
            lines.append(
                f"| {title}{blank} | {len(values)} | {linear:.1f} % | | | {knn:.1f} % | | | |"
            )
    return lines


def rule(results: Results) -> str:
    """How many views are enough: protocol.md's rule, once its cells are there."""
    enough = []
    for experiment in experiments()[:2]:
        reference = experiment.settings[0]
        whole = [setting for setting in experiment.settings if is_whole(setting, results)]
        if not set(experiment.settings[:3]) <= set(whole):  # V = E, E/10 and 1
            return "**The rule for V is open**: cells of the first two experiments are missing.\n"
        fit = reference.views
        for setting in sorted(whole, key=lambda setting: -setting.views):
            paired = against(setting, reference, results)
            if paired is not None and paired.low <= MARGIN:
                break
            fit = setting.views
        enough.append((reference.views, fit))
    told = ", ".join(f"{fit} of {most}" for most, fit in enough)
    share = max(fit / most for most, fit in enough)
    return (
        f"**Rule**: the fewest views from which on no number loses, with its interval, "
        f"{-MARGIN:.0f} point against V = E: {told}; as a share of E at both lengths {share:.3g}.\n"
    )


def plot(experiment: Experiment, results: Results) -> Figure | None:
    """Each setting's probe with its interval; None before two of them have results."""
    rows = [(s, accuracy(_hits(found))) for s in experiment.settings if (found := _of(s, results))]
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: [getattr(row[0], name) for name in experiment.axis])
    names = [" ".join(str(getattr(s, a)) or "pixels" for a in experiment.axis) for s, _ in rows]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    means = [estimate.mean for _, estimate in rows]
    errors = [
        [estimate.mean - estimate.low for _, estimate in rows],
        [estimate.high - estimate.mean for _, estimate in rows],
    ]
    places = range(len(rows))
    axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, color="#28527a")
    axes.set_yticks(places, names)
    axes.set_ylabel(", ".join(experiment.axis))
    axes.set_xlabel("linear probe, %, with 95 % intervals")
    axes.set_title(experiment.title)
    least, most = axes.get_xlim()
    if most - least < 10:  # noise must not fill the page
        axes.set_xlim((least + most) / 2 - 5, (least + most) / 2 + 5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def origins(results: Results) -> str:
    """Commits, machines and days behind the figures."""
    found = sorted({(c["commit"], c["machine"], c["date"]) for c in results.values()})
    if not found:
        return "## Where the figures come from\n\nNo cell was run yet.\n"
    lines = [f"| {commit} | {machine} | {day} |" for commit, machine, day in found]
    head = ["## Where the figures come from\n", "| commit | machine | day |", "| --- | --- | --- |"]
    return "\n".join([*head, *lines, ""])


def is_whole(setting: Cell, results: Results) -> bool:
    """Whether all seeds of a setting are there."""
    return set(_of(setting, results)) == set(SEEDS)


def _of(setting: Cell, results: Results) -> dict[int, Any]:
    """Results of a setting, by seed."""
    named = {seed: dataclasses.replace(setting, seed=seed).name for seed in SEEDS}
    return {seed: results[name] for seed, name in named.items() if name in results}


def _hits(found: dict[int, Any]) -> np.ndarray:
    return np.array([[int(hit) for hit in cell["hits"]] for cell in found.values()])


def against(setting: Cell, reference: Cell, results: Results) -> Estimate | None:
    """Paired difference over the seeds that both have; None for the reference itself."""
    mine, theirs = _of(setting, results), _of(reference, results)
    seeds = [seed for seed in mine if seed in theirs]
    if setting == reference or not seeds:
        return None
    if any(mine[seed]["rows"] != theirs[seed]["rows"] for seed in seeds):
        raise ValueError(f"{setting.name} and {reference.name} were probed on other images")
    prints = {cells[s].get("tokenizer_fingerprint") for cells in (mine, theirs) for s in seeds}
    if setting.tokenizer == reference.tokenizer and len(prints) > 1:
        raise ValueError(f"{setting.name} and {reference.name} predict tokens of two tokenizers")
    pair = (_hits({seed: cells[seed] for seed in seeds}) for cells in (mine, theirs))
    return difference(*pair)


def over_baseline(setting: Cell, name: str, results: Results) -> Estimate | None:
    """Paired difference to `random_init` or `pixels`, over the seeds that have them."""
    mine = _of(setting, results)
    beside = {
        seed: cell
        for seed, cell in _of(of_baselines(setting.data, 0), results).items()
        if seed in mine and name in cell.get("baseline_hits", {})
    }
    if not beside:
        return None
    if any(mine[seed]["rows"] != cell["rows"] for seed, cell in beside.items()):
        raise ValueError(f"{setting.name} was probed on other images than its baselines")
    baseline = [[int(hit) for hit in cell["baseline_hits"][name]] for cell in beside.values()]
    return difference(_hits({seed: mine[seed] for seed in beside}), np.array(baseline))


def _percent(value: Estimate) -> str:
    return f"{value.mean:.1f} % [{value.low:.1f}, {value.high:.1f}]"


def _points(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
