"""What a chain says at its end: tokens against their floor, the picture, features in words."""

from collections.abc import Iterator

from pipelines import storage
from pipelines.evaluate import Result
from pipelines.evaluation.result import PRETRAINED, TITLES
from pipelines.training.pretraining import PretrainResult

DEMO_STEPS = 2000
"""Of `make demo`."""


def headline(trained: PretrainResult, judged: Result | None) -> str:
    """Lines for people, the surest figure first; `judged` is None of images without labels."""
    lines = [*_tokens(trained), *_picture(trained), *_features(trained, judged)]
    return "\n".join(f"  {name:<16}{text}" for name, text in lines)


def _tokens(trained: PretrainResult) -> Iterator[tuple[str, str]]:
    accuracy, floor = trained.mim_accuracy, trained.unigram_accuracy
    if accuracy is not None and floor is not None:
        often = f"always the most frequent one: {100 * floor:.1f} %"
        yield "masked tokens", f"{100 * accuracy:.1f} % are predicted right ({often})"


def _picture(trained: PretrainResult) -> Iterator[tuple[str, str]]:
    picture = trained.run.at("pictures", "reconstruction", f"{trained.steps:09d}.png")
    if storage.exists(picture):
        yield "picture", picture


def _features(trained: PretrainResult, judged: Result | None) -> Iterator[tuple[str, str]]:
    if judged is None:
        yield "features", "not probed: that needs labels of two classes"
        return
    linear = judged.scores[PRETRAINED]["linear"]
    interval = f"[{100 * linear.low:.1f}, {100 * linear.high:.1f}]"
    yield "features", f"linear probe {100 * linear.accuracy:.1f} %, 95 % interval {interval}"
    for name, (gain, low, high) in sorted(judged.gains.items()):
        points = f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        yield "", f"{_words(low, high)} {TITLES[name]}: {points}, image by image"
    gains = any(low > 0 for _, low, _ in judged.gains.values())
    if judged.gains and not gains and trained.steps < DEMO_STEPS:
        yield "", "so short a training shows in its own task first; `make demo` trains longer"


def _words(low: float, high: float) -> str:
    if low > 0:
        return "better than"
    return "worse than" if high < 0 else "not told apart from"
