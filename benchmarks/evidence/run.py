"""Runs the cells of the evidence that have no result yet, one at a time, and writes the document.

    python -m benchmarks.evidence.run [--experiment views] [--seed 0] [--most 1] [--device cuda]

Killed, it goes on where it was: finished cells stand in benchmarks/results/evidence.json (of a GPU
in evidence-cuda.json), the stages of an unfinished one resume by themselves. Several programs, each
with its own seeds, may share results and work: where they share an artefact, one makes it and the
others wait.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import document
from benchmarks.evidence.cells import BATCH, SEEDS, TUNED_BATCH, Cell, experiments
from benchmarks.evidence.data import HALVES
from benchmarks.evidence.stages import NETWORKS, Places, commands, suffix
from benchmarks.front_page import README, with_part
from pipelines.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.json"
DOCUMENT = ROOT / "docs" / "evidence.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=NETWORKS, default="cpu", help="cuda trains a ViT-S")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--experiment", default="", help="only this one")
    parser.add_argument("--seed", type=int, nargs="*", default=SEEDS, help="only cells of these")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="cells run before it ends")
    options = parser.parse_args()
    named = suffix(options.device)
    run(
        (options.work or Path(f"work/evidence{named}")).absolute(),
        options.results or RESULTS.with_stem(f"{RESULTS.stem}{named}"),
        options.document or DOCUMENT.with_stem(f"{DOCUMENT.stem}{named}"),
        options.experiment, options.seed, options.only, options.most, options.device,
    )  # fmt: skip


def run(
    work: Path,
    results: Path,
    page: Path,
    experiment: str = "",
    seeds: Sequence[int] = SEEDS,
    only: str = "",
    most: int = sys.maxsize,
    device: str = "cpu",
) -> None:
    """Runs at most so many missing cells; after each, results and page are written anew."""
    found = read(results)
    chosen = [e for e in experiments() if experiment in ("", e.name)]
    cells = dict.fromkeys(cell for e in chosen for cell in e.cells() if cell.seed in seeds)
    missing = [cell for cell in cells if only in cell.name and cell.name not in found]
    for cell in missing[:most]:
        add(results, cell, measured(cell, work, device))
        publish(page, results, device)
    publish(page, results, device)
    print(f"{max(len(missing) - most, 0)} cells are left; {page}")


def publish(page: Path, results: Path, device: str) -> None:
    """Writes the page and, of the results that README has, its part."""
    with alone(results):
        found = read(results)
        document.write(page, found, device)
        if results == RESULTS:
            README.write_text(with_part(README.read_text(), "evidence", document.front(found)))


def measured(cell: Cell, work: Path, device: str) -> dict[str, Any]:
    """Runs a cell's stages and reads what they found."""
    print(f"\n=== {cell.name}", flush=True)
    for stage, flags in commands(cell, work, device):
        command = [sys.executable, "-m", "jobs", stage, *flags, *tracking(work)]
        subprocess.run(command, check=True, cwd=ROOT)
    at = Places(work, cell)
    return {
        **dataclasses.asdict(cell),
        **(_tuned(at) if cell.tuned else _probed(at.run)),
        "tokenizer_fingerprint": _fingerprint(at),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _probed(run: Path) -> dict[str, Any]:
    """What the probe of a pretrained network found."""
    report, evaluation, hits = _reports(run)
    looks = [event for event in RunDir(str(run)).events() if event["event"] == "probe"]
    return {
        "scores": {
            name: {probe: round(score["accuracy"], 5) for probe, score in probes.items()}
            for name, probes in evaluation["scores"].items()
        },
        "rows": evaluation["identity"]["groups"],
        "hits": hits["linear"],
        "baseline_hits": {name: kept["linear"] for name, kept in hits.get("baselines", {}).items()},
        "held_out_loss": looks[-1]["figures"]["held_out/loss"],
        "images_seen": report["steps"] * BATCH,
        "flops_per_image": report["flops_per_image"],
        "training_seconds": round(report["goodput"]["seconds"]["compute"]),
    }


def _tuned(at: Places) -> dict[str, Any]:
    """What the tests of both fine-tuned networks found: each image is in one."""
    found = [_reports(at.tuned(half)) for half in HALVES]
    return {
        "rows": "+".join(evaluation["identity"]["groups"] for _, evaluation, _ in found),
        "hits": "".join(hits["head"] for *_, hits in found),
        "images_seen": TUNED_BATCH * sum(report["steps"] for report, *_ in found),
        "flops_per_image": found[0][0]["flops_per_image"],
        "training_seconds": round(sum(r["goodput"]["seconds"]["compute"] for r, *_ in found)),
    }


def _reports(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of the training, of its evaluation, and image by image."""
    files = ("report.json", "evaluation/evaluation.json", "evaluation/hits.json")
    report, evaluation, hits = (json.loads((run / file).read_text()) for file in files)
    return report, evaluation, hits


def _fingerprint(at: Places) -> str:
    """Of the tokenizer, which each machine trains a little differently; empty without one."""
    if not at.cell.tokenizer:
        return ""
    return str(json.loads((at.tokenizer / "manifest.json").read_text())["fingerprint"])


def tracking(work: Path) -> list[str]:
    """Every stage is recorded in one MLflow experiment."""
    return [
        f"--tracking.uri=sqlite:///{work / 'mlflow.db'}",
        "--tracking.experiment=evidence",
    ]


def commit() -> str:
    """The commit that is checked out, with a `+` for changes."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()


def read(path: Path) -> dict[str, Any]:
    """Results by the cells' names."""
    return dict(json.loads(path.read_text())["cells"]) if path.exists() else {}


@contextlib.contextmanager
def alone(results: Path) -> Iterator[None]:
    """No other program writes these results, or pages of them, meanwhile."""
    with results.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(path: Path, cell: Cell, result: dict[str, Any]) -> None:
    """Writes one result beside those that are there by now, at once or not at all."""
    with alone(path):
        results = {**read(path), cell.name: result}
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({"cells": results}, indent=1, sort_keys=True) + "\n")
        beside.replace(path)


if __name__ == "__main__":
    main()
