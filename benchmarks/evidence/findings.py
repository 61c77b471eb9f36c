"""What the results say of settings: their cells, and differences image by image."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.evidence.cells import SEEDS, Cell, experiments, of_baselines
from benchmarks.evidence.statistics import Estimate, difference

Results = dict[str, Any]
MARGIN = -1.0
"""Points that fewer views may cost."""


def is_whole(setting: Cell, results: Results) -> bool:
    """Whether all seeds of a setting are there."""
    return set(of(setting, results)) == set(SEEDS)


def of(setting: Cell, results: Results) -> dict[int, Any]:
    """Results of a setting, by seed."""
    named = {seed: dataclasses.replace(setting, seed=seed).name for seed in SEEDS}
    return {seed: results[name] for seed, name in named.items() if name in results}


def hits_of(found: dict[int, Any]) -> np.ndarray:
    return np.array([[int(hit) for hit in cell["hits"]] for cell in found.values()])


def against(setting: Cell, reference: Cell, results: Results) -> Estimate | None:
    """Paired difference over the seeds that both have; None for the reference itself."""
    mine, theirs = of(setting, results), of(reference, results)
    seeds = [seed for seed in mine if seed in theirs]
    if setting == reference or not seeds:
        return None
    if any(mine[seed]["rows"] != theirs[seed]["rows"] for seed in seeds):
        raise ValueError(f"{setting.name} and {reference.name} were probed on other images")
    prints = {cells[s].get("tokenizer_fingerprint") for cells in (mine, theirs) for s in seeds}
    if setting.tokenizer == reference.tokenizer and len(prints) > 1:
        raise ValueError(f"{setting.name} and {reference.name} predict tokens of two tokenizers")
    pair = (hits_of({seed: cells[seed] for seed in seeds}) for cells in (mine, theirs))
    return difference(*pair)


def over_baseline(setting: Cell, name: str, results: Results) -> Estimate | None:
    """Paired difference to `random_init` or `pixels`, over the seeds that have them.

    None for what was fine-tuned: its tests are of other kinds of rows.
    """
    mine = {} if setting.tuned else of(setting, results)
    beside = {
        seed: cell
        for seed, cell in of(of_baselines(setting.data, 0), results).items()
        if seed in mine and name in cell.get("baseline_hits", {})
    }
    if not beside:
        return None
    if any(mine[seed]["rows"] != cell["rows"] for seed, cell in beside.items()):
        raise ValueError(f"{setting.name} was probed on other images than its baselines")
    baseline = [[int(hit) for hit in cell["baseline_hits"][name]] for cell in beside.values()]
    return difference(hits_of({seed: mine[seed] for seed in beside}), np.array(baseline))


def enough(results: Results) -> list[tuple[int, int]] | None:
    """(E, the fewest views from which on no number loses) at each length; None while it is open.

    protocol.md's rule, of whatever numbers of views have all their seeds.
    """
    found = []
    for experiment in experiments()[:2]:
        reference = experiment.settings[0]
        whole = [setting for setting in experiment.settings if is_whole(setting, results)]
        if not set(experiment.settings[:3]) <= set(whole):  # V = E, E/10 and 1
            return None
        fit = reference.views
        for setting in sorted(whole, key=lambda setting: -setting.views):
            paired = against(setting, reference, results)
            if paired is not None and paired.low <= MARGIN:
                break
            fit = setting.views
        found.append((reference.views, fit))
    return found
