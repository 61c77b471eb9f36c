"""What a training leaves of itself when it ends: how far it came, how it ended, where time went."""

import json
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from pipelines import pictures, storage
from pipelines.progress import counted
from pipelines.tracking.datasets import short_name
from pipelines.training.goodput import account
from pipelines.training.run_dir import RunDir

GAVE_UP = "gave_up"
"""The event of a start that is not repeated, for the next would end like it."""


def run_report(
    run: RunDir, total_steps: int, figures: Mapping[str, float], launched_at: float
) -> dict[str, Any]:
    """report.json of a start of the command, at `launched_at`, that has ended."""
    attempts, events = run.attempts(), run.events()
    last = attempts[-1] if attempts else None
    here = last is not None and last.launched_at == launched_at
    outcome, message = (last.outcome, last.message) if last and here else ("", "")
    counts: dict[str, int] = {}
    for event in events:
        counts[event["event"]] = counts.get(event["event"], 0) + 1
        if event["event"] == GAVE_UP and event["time"] >= launched_at:
            outcome, message = "stopped", event["message"]
    return {
        "outcome": outcome,
        "message": message,
        "steps": last.next_step if last else 0,
        "total_steps": total_steps,
        "goodput": account(attempts, time.time()).to_dict(),
        "events": counts,
        **figures,
        "last_period": _last_period(run),
    }


def picture_of_time(run: RunDir, report: Mapping[str, Any]) -> Image.Image:
    """Where the time of a run went, as bars."""
    books = report["goodput"]
    starts, productive = counted(books["attempts"], "start"), 100 * books["goodput"]
    return pictures.bars(
        {name.replace("_", " "): value for name, value in books["seconds"].items() if value > 0},
        title=f"Where the time went · {short_name(run.uri)}, step {report['steps']:,}",
        x_label="seconds",
        note=f"{books['wall_seconds']:,.0f} s in {starts}, {productive:.0f} % productive",
    )


def _last_period(run: RunDir) -> dict[str, Any]:
    try:
        lines = storage.read_bytes(run.at("metrics.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return {}
    if not lines:
        return {}
    try:
        period: dict[str, Any] = json.loads(lines[-1])
    except ValueError:  # torn by a kill
        return {}
    period.pop("time", None)
    return {name: value for name, value in period.items() if not isinstance(value, list)}
