"""A comparison as a table: trainings of the same images side by side, and what each took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines import storage
from pipelines.evaluate import Result
from pipelines.evaluation.probes import accuracy_interval
from pipelines.evaluation.result import PRETRAINED, TITLES
from pipelines.training.pretraining import PretrainResult

SAME_TIME = 1.1
"""Times that lie further apart, as a ratio, are not called the same."""
COLUMNS = (
    "training", "linear probe [95 %]", "against the first", "k-NN", "masked tokens (floor)",
    "steps", "seconds", "images/s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training and its evaluation."""

    name: str
    batch: int
    """Images of a step."""
    trained: PretrainResult
    judged: Result
    seed: int
    """Of the evaluation, the same in all arms."""

    @property
    def seconds(self) -> float:
        """Of its steps, by the books of the run: no start-up, no restart, no probe."""
        books = self.trained.report["goodput"]["seconds"]
        return float(books["compute"] + books["data_wait"])

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """Which images the linear probe got right (n,), and the group of each."""
        kept = storage.read_json(storage.join(self.judged.output, "hits.json"))
        return np.array(list(kept["linear"])) == "1", np.array(kept["groups"])


def comparison(arms: Sequence[Arm]) -> str:
    """The table, and what must be known to read it."""
    rows = [COLUMNS, *(tuple(_cells(arm, arms[0])) for arm in arms), *_baselines(arms[0])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [
        "",
        "Intervals are over the images alone: another seed of the training moves a figure, too.",
        *_on_time(arms),
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _cells(arm: Arm, first: Arm) -> Iterator[str]:
    linear, knn = (arm.judged.scores[PRETRAINED][probe] for probe in ("linear", "knn"))
    yield arm.name
    yield f"{100 * linear.accuracy:.1f} % [{100 * linear.low:.1f}, {100 * linear.high:.1f}]"
    yield "" if arm is first else _difference(arm, first)
    yield f"{100 * knn.accuracy:.1f} %"
    accuracy, floor = arm.trained.mim_accuracy, arm.trained.unigram_accuracy
    if accuracy is None or floor is None:
        yield "predicts pixels"
    else:
        yield f"{100 * accuracy:.1f} % ({100 * floor:.1f})"
    yield f"{arm.trained.steps:,}"
    yield f"{arm.seconds:.0f}"
    yield f"{arm.trained.steps * arm.batch / arm.seconds:.0f}"


def _difference(arm: Arm, first: Arm) -> str:
    """Points by which its probe lies above that of the first, image by image."""
    ours, groups = arm.hits()
    gain = ours.astype(float) - first.hits()[0]
    low, high = accuracy_interval(gain, groups, seed=arm.seed)
    return f"{100 * gain.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _baselines(arm: Arm) -> Iterator[tuple[str, ...]]:
    for name, title in TITLES.items():
        if name != PRETRAINED and (probes := arm.judged.scores.get(name)):
            linear, knn = (f"{100 * probes[probe].accuracy:.1f} %" for probe in ("linear", "knn"))
            yield (title, linear, "", knn, "", "", "", "")


def _on_time(arms: Sequence[Arm]) -> Iterator[str]:
    """What would make the times equal on this machine, where they are not."""
    first = arms[0]
    for arm in arms[1:]:
        ratio = arm.seconds / first.seconds
        if max(ratio, 1 / ratio) > SAME_TIME:
            field = f"arms.{arm.name}.optim.steps = {round(arm.trained.steps / ratio)}"
            yield f"{arm.name} trained {ratio:.2f} times as long as {first.name}; equal: {field}"
