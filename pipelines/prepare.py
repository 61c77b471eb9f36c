"""`prepare`: images of any source, each decoded once and checked, become an image table.

list the source -> units -> [Ray Data: read, examine, write a part, leave a receipt] -> manifest.
What is done is known by its receipt; so an interrupted run goes on where it stopped, and nothing
in the table depends on when, where or in which order it was made.
"""

import dataclasses
import json
import logging
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError, StageFailed
from pipelines.preparation.ahead import mapped_ahead
from pipelines.preparation.decode_process import DECODER, Rules
from pipelines.preparation.plan import (
    MEGABYTE,
    NO_CLASS_COUNTS,
    Plan,
    check_identity,
    make_plan,
    read_plan,
    unit_name,
    work_uri,
)
from pipelines.preparation.report import (
    Ledger,
    PrepareResult,
    reasons,
    record,
    remedy,
    start_tracking,
)
from pipelines.preparation.unit import (
    PART_NAME,
    Receipt,
    UnitTask,
    process_unit,
    read_receipt,
    receipt_uri,
    rejected_table_columns,
)
from pipelines.tables.image_files import REJECTED_SCHEMA, Part
from pipelines.tables.image_table import IGNORED, MANIFEST, REJECTED, ImageTable, commit_manifest

# Ray keeps something for every block of a dataset; so many units are handed to it at a time.
UNITS_PER_DATASET = 2_000
THREADS = 16


def run(config: PrepareConfig, *, decoder: str = DECODER) -> PrepareResult:
    """Prepares the table of `config`, or goes on with it, or says that it is there.

    Args:
        decoder: `module:function` that turns bytes into pixels, see `decode_process.Rules`.

    Raises:
        InputError: source, options or an earlier output do not fit.
        StageFailed: more was rejected than `max_rejected` tolerates.
    """
    for name in ("source", "output"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give a path or a URI")
    output = storage.absolute(config.output)
    if _is_finished(output):
        return _finished(config, output)
    try:
        plan = read_plan(config, output)
        # Asked again, because a plan may be gone for the best of reasons.
        if _is_finished(output):
            return _finished(config, output)
        plan = plan or make_plan(config, output)
        ledger = Ledger(config, plan, _receipts(output, plan))
    except Exception:
        # Another driver may have finished the table and cleared its working files away.
        if not _is_finished(output):
            raise
        return _finished(config, output)
    with start_tracking(config, work_uri(output, "run.json")) as tracked:
        try:
            _run_units(config, output, plan, ledger, decoder)
            result = _commit(config, output, plan)
        except KeyboardInterrupt:
            print(
                f"\nprepare: stopped; {len(ledger.units)} of {len(plan.listings)} units are done "
                "and kept. The same command goes on from here.",
                file=sys.stderr,
            )
            raise
        except Exception:
            if not _is_finished(output):
                raise
            return _finished(config, output)
        record(tracked, result, ledger.source_bytes)
    _clear(output)
    return dataclasses.replace(result, run_id=tracked.run_id)


# Before


def _is_finished(output: str) -> bool:
    return storage.exists(storage.join(output, MANIFEST))


def _finished(config: PrepareConfig, output: str) -> PrepareResult:
    table = ImageTable.open(output)
    source = table.manifest["source"]["uri"]
    check_identity(config, output, {"source": source, **table.manifest["options"]})
    result = PrepareResult.of(output, table.manifest, already_done=True)
    print(f"prepare: already done: {result.summary()}", file=sys.stderr)
    _clear(output)
    return result


def _receipts(output: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Summaries of the units that are done; receipts without their parts are withdrawn."""
    # Parts are written before their receipts, so they are listed after them: another driver may be
    # at work.
    receipts = storage.list_files(work_uri(output, "receipts"), ".json")
    sizes = {
        file.path: file.size for file in storage.list_files(output, ".parquet", recursive=False)
    }
    units = [int(file.path.removesuffix(".json")) for file in receipts]

    def check(unit: int) -> dict[str, Any] | None:
        receipt = read_receipt(output, unit)
        whole = all(sizes.get(part.name) == part.bytes for part in receipt.parts)
        known = unit < len(plan.listings) and receipt.listing == plan.listings[unit]
        if whole and known:
            return receipt.summary(unit)
        storage.delete(receipt_uri(output, unit))
        return None

    found = mapped_ahead(check, units, num_threads=THREADS)
    return (summary for summary in found if summary is not None)


# The job


def _run_units(
    config: PrepareConfig,
    output: str,
    plan: Plan,
    ledger: Ledger,
    decoder: str,
) -> None:
    todo = [unit for unit in range(len(plan.listings)) if unit not in ledger.units]
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
        digits=len(unit_name(0, len(plan.listings))),
        attempts=work_uri(output, "attempts", uuid.uuid4().hex),
    )
    progress = ledger.progress()
    for summary in _summaries(task, plan, todo, config.num_tasks):
        ledger.add(summary)
        ledger.show(progress)
        ledger.check(final=False)
    progress.close()
    ledger.check(final=True)


def _summaries(
    task: UnitTask, plan: Plan, todo: Sequence[int], num_tasks: int
) -> Iterator[dict[str, Any]]:
    """Runs units as a Ray Data job and yields their summaries as they finish."""
    import ray

    def process(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        pairs = zip(batch["unit"].tolist(), batch["listing"].tolist(), strict=True)
        return {"summary": [json.dumps(_outcome(task, *pair)) for pair in pairs]}

    for first in range(0, len(todo), UNITS_PER_DATASET):
        units = todo[first : first + UNITS_PER_DATASET]
        rows = [{"unit": unit, "listing": plan.listings[unit]} for unit in units]
        with _quiet_ray_data():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            # A worker that is killed costs its unit, which Ray gives to another one.
            finished = dataset.map_batches(
                process,
                batch_size=1,
                num_cpus=1,
                compute=ray.data.TaskPoolStrategy(size=num_tasks or None),
            )
            for row in finished.iter_rows():
                summary = json.loads(row["summary"])
                _raise_failure(summary)
                yield summary


def _outcome(task: UnitTask, unit: int, listing: str) -> dict[str, Any]:
    """In the worker. Failures that a person can mend travel as messages, without Ray's frames."""
    try:
        return process_unit(task, unit, listing)
    except InputError as error:
        return {"input_error": str(error)}
    except StageFailed as error:
        return {"stage_failed": str(error)}
    except OSError as error:
        return {"stage_failed": f"unit {unit}: {type(error).__name__}: {error}"}


def _raise_failure(summary: dict[str, Any]) -> None:
    if "input_error" in summary:
        raise InputError(summary["input_error"])
    if "stage_failed" in summary:
        raise StageFailed(
            f"{summary['stage_failed']}\nFinished units are kept; when this is mended, the same "
            "command goes on from here."
        )


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data's own bars and messages off; there is one progress line, ours."""
    import ray

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, level = before
        logger.setLevel(level)


# After


def _commit(config: PrepareConfig, output: str, plan: Plan) -> PrepareResult:
    """Writes what was rejected or ignored, and the manifest, from all receipts in order."""
    parts: list[Part] = []
    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    num_items, max_label = 0, -1
    sinks = [pa.BufferOutputStream() for _ in range(2)]
    with _writer(sinks[0]) as rejected_file, _writer(sinks[1]) as ignored_file:
        for receipt in _all_receipts(output, plan):
            parts.extend(receipt.parts)
            counts.update(reason for _, reason, _ in receipt.rejected)
            num_items += receipt.items
            labels.update(receipt.labels)
            max_label = max(max_label, receipt.max_label)
            ignored.update(reason for _, reason, _ in receipt.ignored)
            for writer, rows in (
                (rejected_file, receipt.rejected),
                (ignored_file, receipt.ignored),
            ):
                if rows:
                    writer.write_table(pa.table(rejected_table_columns(rows), REJECTED_SCHEMA))
    if not parts:
        raise StageFailed(
            f"{config.source}: no usable image among {num_items} items"
            + (f" ({reasons(counts)})" if counts else "")
            + (f"; ignored: {reasons(ignored)}" if ignored else "")
            + remedy(counts + ignored)
        )
    counted = plan.plan_version > NO_CLASS_COUNTS
    storage.write_bytes(storage.join(output, REJECTED), sinks[0].getvalue())
    if counted or ignored:
        storage.write_bytes(storage.join(output, IGNORED), sinks[1].getvalue())
    _delete_other_parts(output, {part.name for part in parts})
    class_names = _class_names(plan, max_label)
    manifest = commit_manifest(
        output,
        parts=parts,
        class_names=class_names,
        class_counts=[labels[number] for number in range(len(class_names))] if counted else None,
        source=plan.source,
        options=plan.options,
        rejected=dict(sorted(counts.items())),
        ignored=dict(sorted(ignored.items())) if counted or ignored else None,
        num_items=num_items,
    )
    return PrepareResult.of(output, manifest, already_done=False)


def _writer(sink: pa.BufferOutputStream) -> pq.ParquetWriter:
    return pq.ParquetWriter(sink, REJECTED_SCHEMA, compression="ZSTD")


def _all_receipts(output: str, plan: Plan) -> Iterator[Receipt]:
    units = range(len(plan.listings))
    return mapped_ahead(lambda unit: read_receipt(output, unit), units, num_threads=THREADS)


def _class_names(plan: Plan, max_label: int) -> Sequence[str]:
    return plan.reader.class_names or [str(number) for number in range(max_label + 1)]


def _delete_other_parts(output: str, names: set[str]) -> None:
    """Parts of an earlier plan, whose working files were removed by hand, belong to no table.

    What others call their files (Spark: `part-00000-` and more) stays.
    """
    for file in storage.list_files(output, ".parquet", recursive=False):
        if PART_NAME.fullmatch(file.path) and file.path not in names:
            storage.delete(storage.join(output, file.path))


def _clear(output: str) -> None:
    """Removes what is of no use beside a finished table: working files, half-written ones.

    The table exists; another driver that writes there at this moment is no failure, and it finds
    the table if its own file is gone.
    """
    with suppress(OSError):
        if storage.is_local(output):
            for name in ("part-*", MANIFEST, REJECTED, IGNORED):
                for left in Path(output).glob(f".{name}.*.tmp"):
                    left.unlink(missing_ok=True)
        storage.delete_prefix(work_uri(output))
