"""docs/evidence.md from the results alone, and README's part of it."""

from pathlib import Path

import numpy as np

from benchmarks.evidence import plots
from benchmarks.evidence.cells import SEEDS, Cell, Experiment, experiments, of_baselines
from benchmarks.evidence.findings import (
    MARGIN,
    Results,
    against,
    enough,
    hits_of,
    is_whole,
    of,
    over_baseline,
)
from benchmarks.evidence.stages import NETWORKS, suffix
from benchmarks.evidence.statistics import Estimate, accuracy

INTRODUCTION = """# Evidence

Two questions, put to the product's own stages: how many stored views are enough, and which targets
are worth predicting. How, and what was decided before the first result:
[benchmarks/evidence/protocol.md](../benchmarks/evidence/protocol.md). This page is written from
[benchmarks/results/{results}](../benchmarks/results/{results}) by
`{command}`, which runs what is still *open* and goes on where it was killed.

## How to read it

- **Data**: the emoji, 64 pixels a side, of which four in five are pretrained on; in some
  experiments 4,096 pictures of Fashion-MNIST, 32 pixels a side. Either has 64 patches.
- **Network**: {network}, 128 images a step. If nothing
  else is said it is BEiT on tokens of a dVAE of 512 codes, 4 stored views, 26 patches hidden, 1,000
  steps.
- **Views**: of an image V views are stored, and shown in turn. An image is seen in E epochs: with
  V = E each view is seen once, as where tokens are computed in the training; with V = 1 one view
  is seen E times. The mask is a new one each time.
- **Linear probe**: mean over three seeds, with an interval of 95 % from a bootstrap over seeds and
  images. *Against the first row* and *against raw pixels* are differences image by image, over the
  seeds that both have. Seeds are drawn with replacement: the variance of three is two thirds of
  what it should be, that of one is none, so intervals are too narrow where seeds differ.
- **Fine-tuned**: all weights are trained on half of the probe's images and tested on the other,
  and the reverse; `random` begins with an untrained network.
- **Held-out loss** is of masked tokens of images that were not pretrained on, a mean without an
  interval; it compares where targets and masks are the same.
- **TFLOP**: forward and backward of all images, two for each multiply-add. Equal ones would take
  equal time on a machine that is as good at all of it. Seconds are wall time; the programs shared
  the machine with others, so they compare nothing.

**What it cannot tell.** Drawings of 64 pixels and networks of this size say nothing certain of
photographs and a ViT-B: jitter of colours is off, crops are mild, a few thousand images are seen
tens of times. Where pretraining gains a point or two over raw pixels, a loss of one would hardly
show. MAE differs from BEiT in more than its targets: random masks of 75 %, no relative positions, a
decoder, a new view each epoch.
"""
OF_FRONT = ("views", "views-long", "views-check", "targets", "finetune")
"""Experiments of the summary."""
PROBED = (
    "seeds", "linear probe", "against the first row", "against raw pixels", "k-NN",
    "held-out loss", "images seen", "TFLOP", "seconds",
)  # fmt: skip
TUNED = ("seeds", "test accuracy", "against the first row", "images seen", "TFLOP", "seconds")
"""Columns of what was probed, and of what was fine-tuned."""


def write(path: Path, results: Results, device: str = "cpu") -> None:
    """The page and, beside it, its plots."""
    pictures = path.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    introduction = INTRODUCTION.format(
        network=NETWORKS[device].told,
        results=f"evidence{suffix(device)}.json",
        command="make evidence" + (f" DEVICE={device}" if suffix(device) else ""),
    )
    short = summary(results, pictures, "pictures", f"evidence{suffix(device)}.svg")
    sections = [introduction, f"## In short\n\n{short}\n"]
    unrun = []
    for experiment in experiments():
        if not any(of(setting, results) for setting in experiment.settings):
            unrun.append(experiment)
            continue
        sections.append(f"## {experiment.title}\n\n{table(experiment, results)}\n")
        file = f"evidence{suffix(device)}-{experiment.name}.svg"
        if plots.of_settings(experiment, results, pictures / file):
            sections.append(f"![{experiment.title}](pictures/{file})\n")
    if unrun:
        sections.append(_not_run(unrun))
    sections.append(origins(results))
    path.write_text("\n".join(sections))


def front(results: Results) -> str:
    """README's part: the summary, with the plot that `write` has drawn."""
    return summary(results, None, "docs/pictures")


def summary(
    results: Results, pictures: Path | None, folder: str, plot: str = "evidence.svg"
) -> str:
    """One table and one plot of the settings that have all seeds, and the rule for V."""
    named = {experiment.name: experiment for experiment in experiments()}
    rows = [
        (experiment, setting)
        for experiment in (named[name] for name in OF_FRONT if name in named)
        for setting in experiment.settings
        if is_whole(setting, results)
    ]
    if not rows:
        return f"No setting has all its seeds yet.\n\n{rule(results)}"
    lines = [
        "| experiment | setting | accuracy | against its first row | against raw pixels |",
        "| --- | --- | --- | --- | --- |",
    ]
    told: set[str] = set()
    for experiment, setting in rows:
        title = "" if experiment.name in told else experiment.title
        told.add(experiment.name)
        lines.append(
            f"| {title} | {plots.label(experiment, setting)} "
            f"| {_percent(accuracy(hits_of(of(setting, results))))} "
            f"| {_points(against(setting, experiment.settings[0], results))} "
            f"| {_points(over_baseline(setting, 'pixels', results))} |"
        )
    parts = ["\n".join(lines)]
    if plots.of_gains(rows, results, pictures / plot if pictures else None):
        parts.append(f"![What each setting gains, with 95 % intervals]({folder}/{plot})")
    return "\n\n".join([*parts, rule(results)])


def table(experiment: Experiment, results: Results) -> str:
    """A row for each setting; one without any result says so."""
    titles = TUNED if experiment.settings[0].tuned else PROBED
    rows = []
    for setting in experiment.settings:
        axis = {name: str(getattr(setting, name)) or "pixels" for name in experiment.axis}
        found = of(setting, results)
        rows.append(axis | (_row(setting, experiment, results) if found else {"seeds": "open"}))
    if titles == PROBED:
        rows += _baselines(experiment, results)
    columns = (*experiment.axis, *titles)
    lines = [
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
        *(f"| {' | '.join(row.get(column, '') for column in columns)} |" for row in rows),
    ]
    return "\n".join(lines)


def _row(setting: Cell, experiment: Experiment, results: Results) -> dict[str, str]:
    """What stands in the columns of a setting that has results."""
    found = of(setting, results)
    one = next(iter(found.values()))
    seconds = np.median([cell["training_seconds"] for cell in found.values()])
    row = {
        "seeds": str(len(found)) + (f" of {len(SEEDS)}" if len(found) < len(SEEDS) else ""),
        "against the first row": _points(against(setting, experiment.settings[0], results)),
        "images seen": f"{one['images_seen']:,}",
        "TFLOP": f"{one['images_seen'] * one['flops_per_image'] / 1e12:.0f}",
        "seconds": f"{seconds:.0f}",
    }
    accurate = _percent(accuracy(hits_of(found)))
    if setting.tuned:
        return row | {"test accuracy": accurate}
    knn = np.mean([cell["scores"]["pretrained"]["knn"] for cell in found.values()])
    loss = np.mean([cell["held_out_loss"] for cell in found.values()])
    return row | {
        "linear probe": accurate,
        "against raw pixels": _points(over_baseline(setting, "pixels", results)),
        "k-NN": f"{100 * knn:.1f} %",
        "held-out loss": f"{loss:.3f}",
    }


def _baselines(experiment: Experiment, results: Results) -> list[dict[str, str]]:
    """Random initialisation, raw pixels and teachers of the same images, where measured."""
    rows = []
    reference = of_baselines(experiment.settings[0].data, 0)
    titled = [(reference, name, title) for name, title in plots.BASELINES.items()]
    titled += [(each, "teacher", f"teacher of {each.tokenizer}") for each in experiment.settings]
    for setting, name, title in titled:
        found = of(setting, results)
        values = [cell["scores"][name] for cell in found.values() if name in cell["scores"]]
        if values:
            linear, knn = (100 * np.mean([v[probe] for v in values]) for probe in ("linear", "knn"))
            rows.append(
                {
                    experiment.axis[0]: title, "seeds": str(len(values)),
                    "linear probe": f"{linear:.1f} %", "k-NN": f"{knn:.1f} %",
                }
            )  # fmt: skip
    return rows


def _not_run(unrun: list[Experiment]) -> str:
    lines = ["## Not run yet\n", "| experiment | settings | |", "| --- | --- | --- |"]
    for experiment in unrun:
        names = ", ".join(plots.label(experiment, setting) for setting in experiment.settings)
        lines.append(f"| {experiment.title} | {names} | open |")
    return "\n".join([*lines, ""])


def rule(results: Results) -> str:
    """How many views are enough, in words."""
    found = enough(results)
    if found is None:
        return "**The rule for V is open**: cells of the first two experiments are missing."
    told = " and ".join(f"{fit} of {most}" for most, fit in found)
    share = max(fit / most for most, fit in found)
    lines = [
        f"**Rule**: of the numbers of views run so far, the fewest from which on none loses, with "
        f"its interval, "
        f"{-MARGIN:.0f} point against V = E are {told}; as a share of E at both lengths "
        f"{share:.3g}."
    ]
    for experiment, (most, fit) in zip(experiments()[:2], found, strict=True):
        reference, *others = experiment.settings
        if fit == most:
            fewer = [
                f"{setting.views} view{'s' * (setting.views > 1)} {_points(paired)}"
                for setting in others
                if is_whole(setting, results)
                and (paired := against(setting, reference, results))
                and paired.low <= MARGIN
            ]
            lines.append(f"Of {most} did not come within it: {', '.join(fewer)}.")
    return " ".join(lines)


def origins(results: Results) -> str:
    """Commits, machines and days behind the figures."""
    found = sorted({(c["commit"], c["machine"], c["date"]) for c in results.values()})
    if not found:
        return "## Where the figures come from\n\nNo cell was run yet.\n"
    lines = [f"| {commit} | {machine} | {day} |" for commit, machine, day in found]
    head = ["## Where the figures come from\n", "| commit | machine | day |", "| --- | --- | --- |"]
    return "\n".join([*head, *lines, ""])


def _percent(value: Estimate) -> str:
    return f"{value.mean:.1f} % [{value.low:.1f}, {value.high:.1f}]"


def _points(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
