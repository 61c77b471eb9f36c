"""How runs compare: what differs between them, seeds of one setting, differences in pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.evaluation.probes import accuracy_interval, enough_seeds, seeds_half_width
from pipelines.reporting.facts import NO_SETTING, Facts
from pipelines.tracking.table import SEPARATOR

MAX_OPTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Facts, ...]
    mean: float | None
    """Of the linear probe over seeds; None without any evaluation."""
    spread: float | None
    """Standard deviation over seeds; None for fewer than two."""
    interval: tuple[float, float] | None
    """95 %, of the mean, over groups of images and seeds; None where images differ. Of one or two
    seeds over images alone, see `enough_seeds`."""
    difference: tuple[float, float, float] | None
    """To the first setting, with its paired 95 % interval; None where images differ."""
    interval_of_seeds: bool
    """Whether `interval` is over seeds, too."""
    difference_of_seeds: bool
    """Whether that of `difference` is."""


def differing(runs: Sequence[Facts]) -> dict[str, list[Any]]:
    """Parameters that are not the same in all runs, and nothing else: name -> value by run."""
    names = sorted({name for run in runs for name in run.config})
    values = {name: [run.config.get(name) for run in runs] for name in names}
    left_out = set(NO_SETTING) - {"seed"}
    return {
        name: found
        for name, found in values.items()
        if any(value != found[0] for value in found)
        and not {name, name.partition(".")[0]} & left_out
    }


def told_apart(runs: Sequence[Facts]) -> tuple[str, list[Facts]]:
    """What the names of several runs share, and the runs by what is left of their names.

    Where that is nothing, or another's as well, the run's id is added.
    """
    words = [run.name.split(SEPARATOR) for run in runs]
    shared = [word for word in words[0] if len(runs) > 1 and all(word in own for own in words)]
    left = [SEPARATOR.join(word for word in own if word not in shared) for own in words]
    named = [
        name if name and left.count(name) == 1 else f"{name} ({run.run_id[:6]})".strip()
        for run, name in zip(runs, left, strict=True)
    ]
    pairs = zip(runs, named, strict=True)
    return SEPARATOR.join(shared), [replace(run, name=name) for run, name in pairs]


def settings_of(runs: Sequence[Facts]) -> list[Setting]:
    """Runs grouped by what they were asked to do: that of the first run, then the best first."""
    groups: dict[str, list[Facts]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    first = next(iter(groups.values()))
    labels = _labels(list(groups.values()))
    found = [
        _setting(label, group, first if group is not first else [])
        for label, group in zip(labels, groups.values(), strict=True)
    ]
    others = sorted(found[1:], key=lambda one: -1.0 if one.mean is None else one.mean, reverse=True)
    return [found[0], *others]


def _setting(label: str, runs: list[Facts], baseline: list[Facts]) -> Setting:
    found = [run.judgement.accuracy for run in runs if run.judgement is not None]
    return Setting(
        label=label,
        runs=tuple(runs),
        mean=float(np.mean(found)) if found else None,
        spread=float(np.std(found, ddof=1)) if len(found) > 1 else None,
        interval=mean_interval(runs),
        difference=paired_difference(runs, baseline) if baseline else None,
        interval_of_seeds=enough_seeds(runs),
        difference_of_seeds=enough_seeds(runs, baseline) if baseline else False,
    )


def _labels(groups: Sequence[Sequence[Facts]]) -> list[str]:
    """What the names of each group's runs share, without a seed; where that tells groups not apart,
    the options that differ, too."""
    labels = []
    for runs in groups:
        first, *others = (run.name.split(SEPARATOR) for run in runs)
        shared = [word for word in first if all(word in words for words in others)]
        labels.append(SEPARATOR.join(word for word in shared if not word.startswith("seed ")))
    options = [name for name in differing([runs[0] for runs in groups]) if name != "seed"]
    for number, runs in enumerate(groups):
        if not labels[number] or labels.count(labels[number]) > 1:
            told = [f"{name} {runs[0].config.get(name)}" for name in options[:MAX_OPTIONS]]
            labels[number] = SEPARATOR.join(filter(None, [labels[number], *told])) or "one setting"
    return labels


def paired_difference(
    runs: Sequence[Facts], baseline: Sequence[Facts]
) -> tuple[float, float, float] | None:
    """Difference of linear probes on the same images and its 95 % interval.

    The interval is over groups of images and, where there are enough, over seeds: squares of both
    half widths add up. Of several seeds an image counts by the share of them that got it
    right. None where not all of them were judged by the same images, or their hits were not kept.
    """
    found = _same_images([*runs, *baseline])
    if found is None:
        return None
    hits, groups, seed = found
    ours, theirs = hits[: len(runs)], hits[len(runs) :]
    low, high = accuracy_interval(ours.mean(axis=0) - theirs.mean(axis=0), groups, seed=seed)
    return _widened(float(ours.mean() - theirs.mean()), low, high, ours, theirs)


def mean_interval(runs: Sequence[Facts]) -> tuple[float, float] | None:
    """95 % interval of the mean of a setting, over groups of images and seeds; None as above.

    Of one run that of its evaluation: groups are drawn as they were there.
    """
    found = _same_images(runs)
    if found is None:
        return None
    hits, groups, seed = found
    low, high = accuracy_interval(hits.mean(axis=0), groups, seed=seed)
    return _widened(float(hits.mean()), low, high, hits)[1:]


def _same_images(runs: Sequence[Facts]) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Hits (runs, images), groups of the images, and the seed of the protocol, if all were judged
    by the same."""
    judged = [run.judgement for run in runs]
    kept = [(one.pairing, one.identity) for one in judged if one is not None and one.pairing]
    if not kept or len(kept) < len(judged) or len({identity for _, identity in kept}) > 1:
        return None
    hits = np.array([pairing.hits for pairing, _ in kept], float)
    return hits, kept[0][0].groups, kept[0][0].seed


def _widened(mean: float, low: float, high: float, *arms: np.ndarray) -> tuple[float, float, float]:
    """An interval over groups, and what the seeds of the arms (seeds, images) add to it."""
    seeds = seeds_half_width(*(arm.mean(axis=1).tolist() for arm in arms))
    return mean, mean - math.hypot(mean - low, seeds), mean + math.hypot(high - mean, seeds)
