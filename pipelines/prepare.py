"""`prepare`: images of any source, each decoded once and checked, become an image table.

list the source -> units -> [Ray Data: read, examine, write a part, leave a receipt] -> manifest.
What is done is known by its receipt; so an interrupted run goes on where it stopped, and nothing
in the table depends on when, where or in which order it was made.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from beit.images import decode_image
from pipelines import pictures, storage, tracking
from pipelines.config.prepare import PrepareConfig
from pipelines.decode_process import DECODER, Rules
from pipelines.errors import InputError, StageFailed
from pipelines.image_table import (
    MANIFEST,
    REJECTED,
    REJECTED_SCHEMA,
    ImageTable,
    Part,
    commit_manifest,
)
from pipelines.prepare_plan import (
    MEGABYTE,
    Plan,
    check_identity,
    make_plan,
    read_plan,
    unit_name,
    work_uri,
)
from pipelines.prepare_unit import (
    Receipt,
    UnitTask,
    process_unit,
    read_receipt,
    rejected_table_columns,
)
from pipelines.progress import Progress
from pipelines.sources import mapped_ahead

# Ray keeps something for every block of a dataset; so many units are handed to it at a time.
UNITS_PER_DATASET = 2_000
THREADS = 16
MAX_CLASSES = 1_000_000
NUM_EXAMPLES = 10
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
    class_names: tuple[str, ...]
    already_done: bool
    """The table was there; nothing was computed."""
    run_id: str = ""

    def __str__(self) -> str:
        parts = f"{self.num_parts} part{'' if self.num_parts == 1 else 's'}"
        rejected = sum(self.rejected.values())
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        reasons = f" ({_reasons(self.rejected)})" if rejected else ""
        return (
            f"{self.uri}: {self.num_rows} images in {parts}{classes}, {rejected} rejected"
            f"{reasons}, fingerprint {self.fingerprint}"
        )


def run(config: PrepareConfig, *, decoder: str = DECODER) -> PrepareResult:
    """Prepares the table of `config`, or goes on with it, or says that it is there.

    Args:
        decoder: `module:function` that turns bytes into pixels, see `decode_process.Rules`.

    Raises:
        InputError: source, options or an earlier output do not fit.
        StageFailed: more was rejected than `max_rejected` tolerates.
    """
    output = storage.absolute(config.output)
    if storage.exists(storage.join(output, MANIFEST)):
        return _finished(config, output)
    plan = read_plan(config, output) or make_plan(config, output)
    done = _receipts(output, plan)
    state = _State(config, plan, done.values())
    with _start_tracking(config, output) as tracked:
        try:
            _run_units(config, output, plan, set(done), state, decoder)
        except KeyboardInterrupt:
            print(
                f"\nprepare: stopped; {state.units} of {len(plan.listings)} units are done and "
                "kept. The same command goes on from here.",
                file=sys.stderr,
            )
            raise
        except Exception:
            if not storage.exists(storage.join(output, MANIFEST)):
                raise
            # Another driver finished the table and cleared its working files away.
            return _finished(config, output)
        result = _commit(config, output, plan)
        _record(tracked, result, state)
    storage.delete_prefix(work_uri(output))
    return dataclasses.replace(result, run_id=tracked.run_id)


# Before


def _finished(config: PrepareConfig, output: str) -> PrepareResult:
    table = ImageTable.open(output)
    source = table.manifest["source"]["uri"]
    check_identity(config, output, {"source": source, **table.manifest["options"]})
    result = _result(output, table.manifest, already_done=True)
    print(f"prepare: already done: {result}", file=sys.stderr)
    return result


def _result(output: str, manifest: dict[str, Any], *, already_done: bool) -> PrepareResult:
    return PrepareResult(
        uri=output,
        fingerprint=manifest["fingerprint"],
        num_rows=manifest["num_rows"],
        num_items=manifest["num_items"],
        num_parts=len(manifest["parts"]),
        rejected=manifest["rejected"],
        class_names=tuple(manifest["class_names"]),
        already_done=already_done,
    )


def _receipts(output: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """Summaries of the units that are done: receipt and parts are there, the listing is ours."""
    sizes = {
        file.path: file.size for file in storage.list_files(output, ".parquet", recursive=False)
    }
    receipts = storage.list_files(work_uri(output, "receipts"), ".json")
    units = [int(file.path.removesuffix(".json")) for file in receipts]

    def check(unit: int) -> dict[str, Any] | None:
        receipt = read_receipt(output, unit)
        whole = all(sizes.get(part.name) == part.bytes for part in receipt.parts)
        known = unit < len(plan.listings) and receipt.listing == plan.listings[unit]
        return receipt.summary(unit) if whole and known else None

    found = mapped_ahead(check, units, num_threads=THREADS)
    return {summary["unit"]: summary for summary in found if summary is not None}


class _State:
    """Counts of what is done; a progress line; the bound on rejected items."""

    def __init__(self, config: PrepareConfig, plan: Plan, done: Any) -> None:
        self.config, self.plan = config, plan
        self.units = self.items = self.rows = self.source_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[Sequence[Any]] = []
        for summary in done:
            self.add(summary)

    def add(self, summary: dict[str, Any]) -> None:
        self.units += 1
        self.items += summary["items"]
        self.rows += summary["rows"]
        self.source_bytes += summary["source_bytes"]
        self.rejected.update(summary["rejected"])
        room = NUM_EXAMPLES - len(self.examples)
        self.examples.extend(summary["examples"][:room])

    @property
    def done(self) -> int:
        """In the unit of the progress line: images, or megabytes where those are not known."""
        if self.plan.num_items is not None:
            return self.items
        return self.source_bytes // MEGABYTE

    def progress(self) -> Progress:
        known = self.plan.num_items
        total = known if known is not None else -(-self.plan.num_bytes // MEGABYTE)
        unit = "images" if known is not None else "MB"
        return Progress(total, "prepare", unit, initial=self.done)

    def check(self, *, final: bool) -> None:
        """Raises StageFailed if more was rejected than is tolerated."""
        limit, rejected = self.config.max_rejected, sum(self.rejected.values())
        total = self.items if final else self.plan.num_items
        if limit < 1 and total is None:
            return
        allowed = limit if limit >= 1 else limit * (total or 0)
        if rejected <= allowed:
            return
        examples = "\n".join(
            f"  {reason}: {key} ({size} bytes)" for key, reason, size in self.examples
        )
        raise StageFailed(
            f"{rejected} of {self.items} items are no usable images, max_rejected = {limit} "
            f"tolerates {int(allowed)}. By reason: {_reasons(self.rejected)}. For example:\n"
            f"{examples}\nClean the source, choose files by a glob, or raise max_rejected: the "
            "same command then goes on from here."
        )


def _reasons(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def _start_tracking(config: PrepareConfig, output: str) -> tracking.Run:
    params = {name: value for name, value in vars(config).items() if name != "tracking"}
    earlier = work_uri(output, "run.json")
    run_id = storage.read_json(earlier)["run_id"] if storage.exists(earlier) else None
    tracked = tracking.start_run(
        config.tracking, stage="prepare", params=params, resume_run_id=run_id or None
    )
    if tracked.run_id != run_id:
        storage.write_json(earlier, {"run_id": tracked.run_id})
    return tracked


# The job


def _run_units(
    config: PrepareConfig,
    output: str,
    plan: Plan,
    done: set[int],
    state: _State,
    decoder: str,
) -> None:
    todo = [unit for unit in range(len(plan.listings)) if unit not in done]
    task = UnitTask(
        output=output,
        reader=plan.reader,
        rules=Rules(
            max_pixels=config.max_pixels,
            min_side=config.min_side,
            max_side=config.max_side,
            quality=config.quality,
            decoder=decoder,
        ),
        decode_timeout=config.decode_timeout,
        part_bytes=int(config.part_mb * MEGABYTE),
        row_group_bytes=int(config.row_group_mb * MEGABYTE),
        names=len(unit_name(0, len(plan.listings))),
    )
    progress = state.progress()
    for summary in _summaries(task, plan, todo, config.num_tasks):
        state.add(summary)
        progress.update(
            state.done,
            rejected=sum(state.rejected.values()),
            units=f"{state.units}/{len(plan.listings)}",
        )
        state.check(final=False)
    progress.close()
    state.check(final=True)


def _summaries(
    task: UnitTask, plan: Plan, todo: Sequence[int], num_tasks: int
) -> Iterator[dict[str, Any]]:
    """Runs units as a Ray Data job and yields their summaries as they finish."""
    import ray

    def process(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        pairs = zip(batch["unit"].tolist(), batch["listing"].tolist(), strict=True)
        return {"summary": [json.dumps(process_unit(task, *pair)) for pair in pairs]}

    for first in range(0, len(todo), UNITS_PER_DATASET):
        units = todo[first : first + UNITS_PER_DATASET]
        rows = [{"unit": unit, "listing": plan.listings[unit]} for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        context = dataset.context
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A worker that is killed costs its unit; an exception of our own is final.
        finished = dataset.map_batches(
            process,
            batch_size=1,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=num_tasks or None),
        )
        for row in finished.iter_rows():
            yield json.loads(row["summary"])


# After


def _commit(config: PrepareConfig, output: str, plan: Plan) -> PrepareResult:
    """Writes `rejected.parquet` and the manifest from all receipts, in the order of units."""
    parts: list[Part] = []
    counts: Counter[str] = Counter()
    num_items, max_label = 0, -1
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECTED_SCHEMA, compression="ZSTD") as writer:
        for receipt in _all_receipts(output, plan):
            parts.extend(receipt.parts)
            counts.update(reason for _, reason, _ in receipt.rejected)
            num_items += receipt.items
            max_label = max(max_label, receipt.max_label)
            if receipt.rejected:
                columns = rejected_table_columns(receipt.rejected)
                writer.write_table(pa.table(columns, REJECTED_SCHEMA))
    if not parts:
        raise StageFailed(
            f"{config.source}: no usable image among {num_items} items"
            + (f" ({_reasons(counts)})" if counts else "")
        )
    storage.write_bytes(storage.join(output, REJECTED), sink.getvalue())
    manifest = commit_manifest(
        output,
        parts=parts,
        class_names=_class_names(plan, max_label),
        source=plan.source,
        options=plan.options,
        rejected=dict(sorted(counts.items())),
        num_items=num_items,
    )
    return _result(output, manifest, already_done=False)


def _all_receipts(output: str, plan: Plan) -> Iterator[Receipt]:
    units = range(len(plan.listings))
    return mapped_ahead(lambda unit: read_receipt(output, unit), units, num_threads=THREADS)


def _class_names(plan: Plan, max_label: int) -> Sequence[str]:
    if plan.reader.class_names or max_label < 0:
        return plan.reader.class_names
    if max_label >= MAX_CLASSES:
        field = plan.reader.label_field or "cls"
        raise InputError(
            f"label_field = {field!r}: holds {max_label}, which is no class number; "
            "name another field, or set labels = 'none'"
        )
    return [str(number) for number in range(max_label + 1)]


def _record(tracked: tracking.Run, result: PrepareResult, state: _State) -> None:
    """Counts, pictures and the fingerprint, for people and for later stages' runs."""
    rejected = sum(result.rejected.values())
    counts: dict[str, float] = {
        "images": result.num_rows,
        "items": result.num_items,
        "rejected": rejected,
        "classes": len(result.class_names),
        "parts": result.num_parts,
        "source_mb": state.source_bytes / MEGABYTE,
    }
    counts |= {f"rejected/{reason}": count for reason, count in result.rejected.items()}
    tracked.log_metrics(counts)
    tracked.set_output(
        tracking.Dataset(name="image_table", uri=result.uri, digest=result.fingerprint)
    )
    if state.examples:
        tracked.log_table("rejected.json", rejected_table_columns(state.examples))  # type: ignore[arg-type]
    if tracked.run_id:
        tracked.log_image("images", sample_sheet(ImageTable.open(result.uri)))
    tracked.set_note(f"Image table `{result.uri}`\n\n{result}")


def sample_sheet(table: ImageTable, *, num_images: int = SHEET_IMAGES) -> Image.Image:
    """A contact sheet of images spread over the table; reads a few row groups."""
    groups = np.linspace(0, len(table.row_groups) - 1, 6).round().astype(int)
    per_group = -(-num_images // len(set(groups.tolist())))
    images, labels = [], []
    for group in sorted(set(groups.tolist())):
        rows = table.read_row_group(group, ["image", "label", "key"])
        chosen = np.unique(np.linspace(0, rows.num_rows - 1, per_group).round().astype(int))
        for row in rows.take(chosen.tolist()).to_pylist():
            tile = decode_image(row["image"]).resize((96, 96))
            images.append(np.asarray(tile).transpose(2, 0, 1))
            label = row["label"]
            labels.append(row["key"] if label is None else table.class_names[label])
    shown, names = images[:num_images], labels[:num_images]
    title = f"{len(shown)} of {table.num_rows} images"
    return pictures.contact_sheet(shown, labels=names, title=title)
