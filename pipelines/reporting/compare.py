"""How runs compare: what differs between them, seeds of one setting, differences in pairs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluation.probes import accuracy_interval
from pipelines.reporting.facts import NO_SETTING, Facts


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Facts, ...]
    mean: float | None
    """Of the linear probe over seeds; None without any evaluation."""
    spread: float | None
    """Standard deviation over seeds; None for fewer than two."""
    difference: tuple[float, float, float] | None
    """To the first setting, with its paired 95 % interval; None where images differ."""


def differing(runs: Sequence[Facts]) -> dict[str, list[Any]]:
    """Parameters that are not the same in all runs, and nothing else: name -> value by run."""
    names = sorted({name for run in runs for name in run.config})
    values = {name: [run.config.get(name) for run in runs] for name in names}
    left_out = {name for name in NO_SETTING if name != "seed"}
    return {
        name: found
        for name, found in values.items()
        if any(value != found[0] for value in found)
        and not {name, name.partition(".")[0]} & left_out
    }


def settings_of(runs: Sequence[Facts]) -> list[Setting]:
    """Runs grouped by what they were asked to do: that of the first run, then the best first."""
    groups: dict[str, list[Facts]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    first = next(iter(groups.values()))
    found = [_setting(group, first if group is not first else []) for group in groups.values()]
    others = sorted(found[1:], key=lambda one: -1.0 if one.mean is None else one.mean, reverse=True)
    return [found[0], *others]


def _setting(runs: list[Facts], baseline: list[Facts]) -> Setting:
    found = [run.judgement.accuracy for run in runs if run.judgement is not None]
    return Setting(
        # A name ends with its seed, which is no part of the setting.
        label=re.sub(r" · seed \S+$", "", runs[0].name),
        runs=tuple(runs),
        mean=float(np.mean(found)) if found else None,
        spread=float(np.std(found, ddof=1)) if len(found) > 1 else None,
        difference=paired_difference(runs, baseline) if baseline else None,
    )


def paired_difference(
    runs: Sequence[Facts], baseline: Sequence[Facts]
) -> tuple[float, float, float] | None:
    """Difference of linear probes on the same images and its 95 % interval over their groups.

    Of several seeds an image counts by the share of them that got it right. None where not all of
    them were judged by the same images, or their hits were not kept.
    """
    judged = [run.judgement for run in (*runs, *baseline)]
    kept = [(one.pairing, one.identity) for one in judged if one is not None and one.pairing]
    if len(kept) < len(judged) or len({identity for _, identity in kept}) > 1:
        return None
    hits = [pairing.hits for pairing, _ in kept]
    difference = np.mean(hits[: len(runs)], axis=0) - np.mean(hits[len(runs) :], axis=0)
    groups = [str(group) for group in kept[0][0].groups]
    low, high = accuracy_interval(difference, groups, seed=0)
    return float(difference.mean()), low, high
