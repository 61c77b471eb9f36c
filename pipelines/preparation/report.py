"""What a prepare tells: progress, counts by reason, the result, and its MLflow run."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from beit import git_lfs
from beit.images import decode_image
from pipelines import pictures, storage, tracking
from pipelines.config.prepare import PrepareConfig, tolerated, tolerated_share
from pipelines.errors import StageFailed, printable
from pipelines.preparation.samples import UNCLEAR
from pipelines.preparation.source_plan import MEGABYTE, SourcePlan
from pipelines.progress import Progress
from pipelines.records import read_record, write_record
from pipelines.tables.image_table import IGNORED, REJECTED, ImageTable
from pipelines.tracking.datasets import short_name

NUM_EXAMPLES = 10
MAX_CLASSES_SAID = 12
MAX_TABLE_ROWS = 500
# An estimated share must be as many times too large, after as many units, to stop the stage early.
ESTIMATE_MARGIN, ESTIMATE_UNITS = 2, 3
SHEET_IMAGES = 48


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What a prepare made or found."""

    uri: str
    fingerprint: str
    num_rows: int
    num_items: int
    num_parts: int
    rejected: dict[str, int]
    """Rejected items by reason."""
    ignored: dict[str, int]
    """Files beside the data by reason."""
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Rows of each class; empty where an older manifest does not say."""
    told_by: str
    """What gave rows their classes."""
    already_done: bool
    """The table was there; nothing was computed."""
    run_id: str = ""
    against: str = ""
    """What is new, where an older table was given."""

    @classmethod
    def of(cls, uri: str, manifest: Mapping[str, Any], *, already_done: bool) -> "PrepareResult":
        """What a table's manifest says."""
        return cls(
            uri=uri,
            fingerprint=manifest["fingerprint"],
            num_rows=manifest["num_rows"],
            num_items=manifest["num_items"],
            num_parts=len(manifest["parts"]),
            rejected=manifest["rejected"],
            ignored=manifest.get("ignored", {}),
            class_names=tuple(manifest["class_names"]),
            class_counts=tuple(manifest.get("class_counts", ())),
            told_by=_told_by(manifest["source"]["format"], manifest["options"]),
            already_done=already_done,
        )

    def summary(self) -> str:
        """One line with the numbers a user wants."""
        parts = f"{self.num_parts} part{'' if self.num_parts == 1 else 's'}"
        rejected = f"{sum(self.rejected.values())} rejected{self._why(self.rejected, REJECTED)}"
        ignored = sum(self.ignored.values())
        beside = f"{ignored} ignored{self._why(self.ignored, IGNORED)}, " if ignored else ""
        return (
            f"{self.uri}: {self.num_rows} images in {parts}, {rejected}, {beside}"
            f"{self.classes()}, fingerprint {self.fingerprint}"
            + (f"; {self.against}" if self.against else "")
        )

    def _why(self, counts: Mapping[str, int], listed: str) -> str:
        return f" ({reasons(counts)}: {storage.join(self.uri, listed)})" if counts else ""

    def classes(self) -> str:
        """`3 classes: cat 812, dog 790, owl 4 (by first folder)`: the most frequent first."""
        if not self.class_names:
            return "no labels"
        counts = dict(zip(self.class_names, self.class_counts, strict=False))
        ordered = sorted(counts, key=lambda name: (-counts[name], name))
        said = [f"{printable(name)} {counts[name]}" for name in ordered]
        if len(said) > MAX_CLASSES_SAID:
            said = [*said[: MAX_CLASSES_SAID - 2], "...", said[-1]]
        without = self.num_rows - sum(self.class_counts)
        unlabelled = f", {without} images without a label" if self.class_counts and without else ""
        plural = "" if len(self.class_names) == 1 else "es"
        return (
            f"{len(self.class_names)} class{plural}"
            f"{': ' if said else ''}{', '.join(said)} (by {self.told_by}){unlabelled}"
        )


def _told_by(source_format: str, options: Mapping[str, Any]) -> str:
    field = options.get("label_field")
    if source_format == "parquet":
        return f"column {field or 'label'}"
    if source_format == "webdataset":
        return f"member .{field or 'cls'}"
    level = options.get("label_level", 1)
    return "first folder" if level == 1 else f"folder {level} below the source"


def reasons(counts: Mapping[str, int]) -> str:
    """`3 truncated, 1 empty`: the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


REMEDIES = {
    "bad_label": "labels are whole numbers, or texts in Parquet; name what holds them with "
    "--label_field, or set --labels none",
    "compressed_tar": "unpack it to .tar, whatever its name says",
    "no_image": "a sample without a picture, or a row without bytes (a path beside them is not "
    "followed: write the bytes into the column)",
}


def remedy(counts: Mapping[str, int]) -> str:
    """What to do about rejected or ignored items, for those reasons that tell it; on new lines."""
    known = {"lfs_pointer": git_lfs.REMEDY, **UNCLEAR, **REMEDIES}
    return "".join(f"\n{reason}: {known[reason]}." for reason in known if counts.get(reason))


class Totals:
    """Counts of what is done, for the progress line and for the bound on rejected items."""

    def __init__(
        self, config: PrepareConfig, plan: SourcePlan, done: Iterable[Mapping[str, Any]]
    ) -> None:
        """`done`: summaries of the units that an earlier run finished."""
        self.config, self.plan = config, plan
        self.units: set[int] = set()
        self.items = self.source_bytes = self.lost_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.examples: list[Sequence[Any]] = []
        for summary in done:
            self.add(summary)

    def add(self, summary: Mapping[str, Any]) -> None:
        """Books a unit's summary."""
        self.units.add(summary["unit"])
        self.items += summary["items"]
        self.source_bytes += summary["source_bytes"]
        self.lost_bytes += summary["lost_bytes"]
        self.rejected.update(summary["rejected"])
        self.ignored.update(summary["ignored"])
        room = NUM_EXAMPLES - len(self.examples)
        self.examples.extend(summary["examples"][:room])

    @property
    def done(self) -> int:
        """In the unit of the progress line: images, or megabytes where those are not known."""
        if self.plan.num_items is not None:
            return self.items + sum(self.ignored.values())
        return -(-self.source_bytes // MEGABYTE)

    def progress(self) -> Progress:
        """The progress line, at what is done already."""
        known = self.plan.num_items
        total = known if known is not None else -(-self.plan.num_bytes // MEGABYTE)
        unit = "images" if known is not None else "MB"
        return Progress(total, "prepare", unit, initial=self.done)

    def show(self, progress: Progress) -> None:
        """Updates the progress line."""
        units = f"{len(self.units)}/{len(self.plan.listings)}"
        counts = {"rejected": sum(self.rejected.values())}
        if self.ignored:
            counts["ignored"] = sum(self.ignored.values())
        progress.update(self.done, **counts, units=units)

    def check(self, *, final: bool) -> None:
        """Raises StageFailed if more was rejected than is tolerated.

        A share refers to all items; and to all bytes, because a lost container is one item that
        stands for many. How many items tars hold is estimated from those that were read.
        """
        limit, rejected = self.config.max_rejected, sum(self.rejected.values())
        allowed, share = self._allowed(final), tolerated_share(limit)
        lost_too_much = share is not None and self.lost_bytes > share * self.plan.num_bytes
        if rejected <= allowed and not lost_too_much:
            return
        examples = "\n".join(
            f"  {reason}: {printable(key)} ({size} bytes)" for key, reason, size in self.examples
        )
        tolerated = f" tolerates {int(allowed)}" if allowed < float("inf") else ""
        lost = f"{self.lost_bytes} of {self.plan.num_bytes} bytes lie in files that cannot be read."
        raise StageFailed(
            f"{rejected} of {self.items} items are no usable images, max_rejected = {limit}"
            f"{tolerated}. By reason: {reasons(self.rejected)}. "
            f"{lost if self.lost_bytes else ''}\nFor example:\n{examples}"
            f"{remedy(self.rejected + self.ignored)}\n"
            "Raise max_rejected: the same command then goes on from here. Or clean the source, or "
            "choose files by a glob, and give another output."
        )

    def _allowed(self, final: bool) -> float:
        limit = self.config.max_rejected
        if tolerated_share(limit) is None or final:
            return tolerated(limit, self.items)
        if self.plan.num_items is not None:
            return tolerated(limit, self.plan.num_items)
        if len(self.units) < ESTIMATE_UNITS or not self.source_bytes:
            return float("inf")
        estimate = self.items * self.plan.num_bytes / self.source_bytes
        return ESTIMATE_MARGIN * tolerated(limit, estimate)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run in MLflow with which an interrupted prepare goes on; "": none."""

    run_id: str


def start_tracking(config: PrepareConfig, run_file: str, check: Callable[[], None]) -> tracking.Run:
    """Starts the stage's run, or goes on with the one noted in `run_file`.

    `check` as in `storage.write_bytes`.
    """
    params = {name: value for name, value in vars(config).items() if name != "tracking"}
    try:
        earlier = read_record(run_file, TrackedRun, "remove it").run_id
    except FileNotFoundError:
        earlier = ""
    run = tracking.start_run(
        config.tracking,
        stage="prepare",
        params=params,
        resume_run_id=earlier,
        output=storage.absolute(config.output),
    )
    if run.run_id != earlier:
        write_record(run_file, {"run_id": run.run_id}, check=check)
    return run


def record(run: tracking.Run, result: PrepareResult, source_bytes: int) -> None:
    """Counts, pictures and the fingerprint, for people and for the runs of later stages."""
    counts: dict[str, float] = {
        "images": result.num_rows,
        "items": result.num_items,
        "rejected": sum(result.rejected.values()),
        "ignored": sum(result.ignored.values()),
        "classes": len(result.class_names),
        "parts": result.num_parts,
        "source_mb": source_bytes / MEGABYTE,
    }
    counts |= {f"rejected/{reason}": count for reason, count in result.rejected.items()}
    counts |= {f"ignored/{reason}": count for reason, count in result.ignored.items()}
    run.log_metrics(counts)
    run.set_output(tracking.Dataset(name="image_table", uri=result.uri, digest=result.fingerprint))
    run.set_note(result.summary())
    if run.run_id:
        if result.rejected:
            run.log_table("rejected.json", _first_rejected(result.uri))
        run.log_image("images", sample_sheet(ImageTable.open(result.uri)))


def _first_rejected(uri: str) -> dict[str, list[Any]]:
    with storage.open_input(storage.join(uri, REJECTED)) as file:
        batch = next(pq.ParquetFile(file).iter_batches(MAX_TABLE_ROWS))
    columns: dict[str, list[Any]] = batch.to_pydict()
    return columns


def sample_sheet(table: ImageTable) -> Image.Image:
    """A contact sheet of images spread over the table; reads a few row groups."""
    spread = np.linspace(0, len(table.row_groups) - 1, 6).round().astype(int)
    groups = sorted(set(spread.tolist()))
    per_group = -(-SHEET_IMAGES // len(groups))
    images, labels = [], []
    for group in groups:
        rows = table.read_row_group(group, ["image", "label", "key"])
        chosen = np.unique(np.linspace(0, rows.num_rows - 1, per_group).round().astype(int))
        for row in rows.take(chosen.tolist()).to_pylist():
            images.append(np.asarray(decode_image(row["image"])).transpose(2, 0, 1))
            label = row["label"]
            labels.append(row["key"] if label is None else table.class_names[label])
    shown, names = images[:SHEET_IMAGES], labels[:SHEET_IMAGES]
    title = f"{len(shown)} of {table.num_rows:,} images · {short_name(table.uri)}"
    return pictures.contact_sheet(shown, labels=names, title=title)
