"""What a tokenize run tells: waiting shares while it runs, code usage and pictures at its end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines import pictures, storage
from pipelines.config.tokenize_images import GateConfig
from pipelines.errors import StageFailed
from pipelines.painting import open_painter
from pipelines.rendering.result import RenderResult
from pipelines.scorecard import TokenStatistics, evenly_spaced, token_statistics
from pipelines.steps import say
from pipelines.tables import token_files
from pipelines.tables.image_table import ImageParts
from pipelines.tables.token_table import MISSING, TokenTable
from pipelines.tokenization.task import TokenizeTask
from pipelines.tokenization.work import tokenizer_views
from pipelines.tracking import Run
from pipelines.tracking.datasets import short_name
from pipelines.units import Outcome

LOG_EVERY_SECONDS = 10.0
# Code usage of a finished table is taken from so many rows of so many files at most.
USAGE_FILES, USAGE_ROWS = 16, 256
NUM_PICTURES = 8
SHORT_UNIT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What the stage made."""

    uri: str
    fingerprint: str
    """Of the token table; empty after a dry run."""
    num_rows: int
    num_views: int
    num_units: int
    units_computed: int
    """Units that this run wrote; 0 if all was done before."""
    images_reused: int
    """Images in them whose tokens were copied from older tables."""
    rejected_units: int
    seconds: float
    """Spent computing, from the first unit given out to the last receipt."""
    images_per_second: float
    codes_used: int
    perplexity: float
    views: RenderResult | None = None
    """Of `store_views`."""

    @property
    def already_done(self) -> bool:
        """There was nothing left to do."""
        return not self.units_computed and (self.views is None or self.views.already_done)

    def summary(self) -> str:
        """One line for the user."""
        if not self.fingerprint:
            return f"{self.uri}: nothing was done (dry run)"
        views = f"; stored views: {self.views.summary()}" if self.views else ""
        return self._tokens() + views

    def _tokens(self) -> str:
        done = f", {self.rejected_units} units rejected" if self.rejected_units else ""
        rate = f" at {self.images_per_second:,.1f} images/s" if self.units_computed else ""
        if self.images_reused:
            done = f", reused {self.images_reused:,} of {self.num_rows:,} images{done}"
        return (
            f"{self.uri}: {self.num_views} views of {self.num_rows:,} images{rate}{done}; "
            f"{self.codes_used} codes used, perplexity {self.perplexity:.1f}"
        )


def began(outcome: Outcome) -> float:
    """When the work on a unit that has just ended began, on the monotonic clock.

    Without the time that its pixels lay ready: the first ones wait for encoders to start.
    """
    seconds: dict[str, float] = outcome.facts["seconds"]
    work = sum(seconds.get(name, 0.0) for name in ("read", "render", "encode", "write"))
    return time.monotonic() - work


class Meter:
    """Adds up where units spent their time."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.begin = self.logged = time.monotonic()
        self.rows = self.units = self.step = 0
        self.seconds = dict.fromkeys(("read", "render", "queued", "idle", "encode", "write"), 0.0)

    def add(self, outcome: Outcome, rows: int) -> None:
        """Enters the outcome of a unit of so many rows."""
        seconds = outcome.facts.get("seconds")
        if not seconds:
            return
        self.rows += rows
        if "encode" not in seconds:  # all of it was copied, which says nothing of encoders
            return
        self.units += 1
        for name in self.seconds:
            self.seconds[name] += seconds.get(name, 0.0)
        if time.monotonic() - self.logged > LOG_EVERY_SECONDS:
            self.flush()

    def shares(self) -> dict[str, float]:
        """Share of its time that each stage waits.

        `encoders`: of the actors' time, for pixels. `decoding`: of the life of a unit in the CPU
        stage, rendered and queued for an encoder. `reading`: of a decode task's time, for bytes.
        """
        s = self.seconds
        return {
            "encoders": _share(s["idle"], s["encode"]),
            "decoding": _share(s["queued"], s["read"] + s["render"]),
            "reading": _share(s["read"], s["render"]),
        }

    def waiting(self) -> str:
        """The shares as a few words."""
        return " ".join(f"{name} {share:.0%}" for name, share in self.shares().items())

    def flush(self) -> None:
        """Sends the figures so far to the tracking server."""
        self.logged = time.monotonic()
        if not self.units:
            return
        self.step += 1
        elapsed = max(self.logged - self.begin, 1e-9)
        metrics = {f"waiting_{name}": share for name, share in self.shares().items()}
        metrics |= {"images_per_second": self.rows / elapsed, "units": float(self.units)}
        metrics |= {f"seconds_per_unit_{k}": v / self.units for k, v in self.seconds.items()}
        self.run.log_metrics(metrics, self.step)

    def advise(self) -> None:
        """Says what would have been faster, where it is clear."""
        if not self.units:
            return
        per_unit = self.seconds["encode"] / self.units
        if self.units > 16 and per_unit < SHORT_UNIT_SECONDS / 4:
            say(
                f"units took {per_unit:.2f} s each; next time rows_per_unit could be "
                f"{SHORT_UNIT_SECONDS / max(per_unit, 1e-3):.0f} times as large (2 s and more "
                "hide the cost of scheduling)"
            )
        if self.units > 16 and self.shares()["encoders"] > 0.3:
            say(
                f"encoders waited {self.shares()['encoders']:.0%} of their time for pixels: more "
                "CPUs for decoding would help"
            )


def _share(waiting: float, working: float) -> float:
    return waiting / (waiting + working) if waiting + working > 0 else 0.0


def _statistics(token_ids: np.ndarray, table: token_files.Identity) -> TokenStatistics:
    grids = token_ids[token_ids[..., 0] != MISSING].reshape(-1, *table.grid_size)
    return token_statistics(grids, table.vocab_size)


def check_usage(task: TokenizeTask, names: Sequence[str], gate: GateConfig) -> None:
    """Raises StageFailed if the tokens of these files use too little of the vocabulary."""
    ids = [
        token_files.split_columns(
            token_files.read_file(storage.join(task.output, name)), task.identity
        )[1]
        for name in names
    ]
    usage = _statistics(np.concatenate(ids), task.identity)
    for field, value, bound in (
        ("min_perplexity", usage.perplexity, gate.min_perplexity),
        ("min_codes", usage.codes_used, gate.min_codes),
    ):
        if value < bound:
            raise StageFailed(
                f"the tokenizer has collapsed: gate.{field} = {bound:g}, but the first "
                f"{usage.num_tokens:,} tokens use {usage.codes_used} of {usage.vocab_size} codes "
                f"(perplexity {usage.perplexity:.1f}); train a better tokenizer, or lower the gate"
            )


def _sample(table: TokenTable) -> np.ndarray:
    """Token ids (n, V, N) of rows from files spread over the table."""
    spans = [table.file_rows(int(i)) for i in evenly_spaced(table.num_files, USAGE_FILES)]
    ids = [table.read_rows(span[0], span[:USAGE_ROWS][-1] + 1)[1] for span in spans]
    return np.concatenate(ids)


def table_usage(table: TokenTable) -> TokenStatistics:
    """Code usage of a table, from a sample."""
    return _statistics(_sample(table), table.identity)


def log(
    run: Run, images: ImageParts, table: TokenTable, tokenizer_uri: str, result: TokenizeResult
) -> None:
    """Figures and pictures of the finished table."""
    if not run.run_id:
        return
    run.log_metrics(
        {
            "codes_used": result.codes_used,
            "perplexity": result.perplexity,
            "rejected_units": result.rejected_units,
            "images_reused": result.images_reused,
            "images_per_second_total": result.images_per_second,
            "bytes": float(sum(table.manifest["files"]["size"])),
        }
    )
    counts = np.bincount(_sample(table).reshape(-1), minlength=table.vocab_size)
    where = f" · {short_name(table.uri)}"
    run.log_image("codebook_usage", pictures.codebook_usage(counts, title=f"Codebook usage{where}"))
    run.log_image("views_and_tokens", views_picture(images, table, tokenizer_uri))


def views_picture(images: ImageParts, table: TokenTable, tokenizer_uri: str) -> Any:
    """Some views as the tokenizer saw them, beside what their tokens stand for."""
    painter = open_painter(tokenizer_uri)
    present = [
        row for row in evenly_spaced(table.num_rows, NUM_PICTURES) if _has_tokens(table, row)
    ]
    views = []
    for _, rows in images.read_scattered(present, ["key", "image", "digest"]):
        for image in rows.to_pylist():
            pixels, _ = tokenizer_views(
                image["image"], image["digest"], table.identity, key=image["key"]
            )
            views.append(pixels[0].transpose(2, 0, 1))
    tokens = [table.read_rows(int(row), int(row) + 1)[1][0, 0] for row in present]
    ids = torch.from_numpy(np.stack(tokens).astype(np.int64))
    shown, title = np.stack(views), f"Views and their tokens · {short_name(table.uri)}"
    if painter is None:
        return pictures.token_map(ids.numpy(), grid_size=table.grid_size, images=shown, title=title)
    painted = painter.paint(ids).numpy()
    return pictures.tokenizer_grid(shown, painted, title=title, note=painter.note)


def _has_tokens(table: TokenTable, row: int) -> bool:
    return bool(table.read_rows(int(row), int(row) + 1)[1][0, 0, 0] != MISSING)
