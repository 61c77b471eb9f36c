"""What an evaluation found, and how it is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired

from typing_extensions import TypedDict

PRETRAINED, BASELINE, RANDOM, PIXELS = "pretrained", "baseline", "random_init", "pixels"
TEACHER = "teacher"
WITHOUT_BLOCKS = (PIXELS, TEACHER)
HEAD = "head"
TITLES = {
    PRETRAINED: "pretrained",
    BASELINE: "baseline run",
    RANDOM: "random initialisation",
    PIXELS: "raw pixels",
    TEACHER: "the teacher",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One probe of one kind of features, over all test rows."""

    accuracy: float
    low: float
    high: float
    """95 % interval, by bootstrap over groups."""
    class_accuracy: list[float | None]
    """Accuracy of each class; None where no image of it was tested."""
    layers: list[int]
    """Block chosen in each fold; 0 where there are none (pixels, teacher)."""
    layer_accuracy: list[float]
    """Validation accuracy of every candidate block, mean over folds."""
    layer_errors: list[float] = field(default_factory=list)
    """Its standard error over folds; empty for one fold."""


class Report(TypedDict):
    """What must stand in evaluation.json."""

    scores: dict[str, dict[str, dict[str, Any]]]
    gains: dict[str, list[float]]
    majority: float
    num_images: int
    class_names: list[str]
    layers: list[int]
    head: NotRequired[list[float] | None]
    teacher: NotRequired[str]
    damaged: NotRequired[list[str]]
    identity: NotRequired[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation found."""

    scores: dict[str, dict[str, Score]]
    """Features -> probe (linear, knn, attentive) -> score."""
    gains: dict[str, tuple[float, float, float]]
    """Pretrained minus baseline, linear probe: difference and its paired 95 % interval."""
    head: tuple[float, ...] | None
    """Accuracy of a classifier's own head and its 95 % interval; None without one."""
    teacher: str = ""
    """What it is, in words; empty without one."""
    majority: float
    """Accuracy of always naming the most frequent class."""
    num_images: int
    damaged: int = 0
    """Images that were left out because they do not decode."""
    class_names: list[str]
    layers: list[int]
    """Candidate blocks."""
    output: str
    already_done: bool

    def summary(self) -> str:
        """One line for people."""
        linear = {name: score["linear"].accuracy for name, score in self.scores.items()}
        knn = self.scores[PRETRAINED]["knn"].accuracy
        text = f"linear probe {100 * linear[PRETRAINED]:.1f} %"
        others = [
            f"{TITLES[name]} {100 * linear[name]:.1f} %" for name in linear if name != PRETRAINED
        ]
        if others:
            text += f" ({', '.join(others)})"
        if self.head is not None:
            text += f", own head {100 * self.head[0]:.1f} %"
        attentive = self.scores[PRETRAINED].get("attentive")
        if attentive is not None:
            text += f", attentive probe {100 * attentive.accuracy:.1f} %"
        text += f", k-NN {100 * knn:.1f} %, most frequent class {100 * self.majority:.1f} %"
        text += f", {self.num_images} images"
        if self.damaged:
            text += f" ({self.damaged} left out: they do not decode)"
        return text + (", was done already" if self.already_done else "")


def result_of(report: Mapping[str, Any], output: str, *, already_done: bool) -> Result:
    """What a report in `output` says."""
    return Result(
        scores={
            name: {probe: Score(**score) for probe, score in probes.items()}
            for name, probes in report["scores"].items()
        },
        head=tuple(report["head"]) if report.get("head") else None,
        gains={name: tuple(values) for name, values in report["gains"].items()},
        teacher=report.get("teacher", ""),
        majority=report["majority"],
        num_images=report["num_images"],
        damaged=len(report.get("damaged", [])),
        class_names=report["class_names"],
        layers=report["layers"],
        output=output,
        already_done=already_done,
    )
