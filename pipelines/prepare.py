"""`prepare`: images of any source, each decoded once and checked, become an image table.

list the source -> units -> [Ray Data: read, examine, write a part, leave a receipt] -> manifest.
What is done is known by its receipt; so an interrupted run goes on where it stopped, and nothing
in the table depends on when, where or in which order it was made.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.actor import ActorHandle

from pipelines import lease, storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import DamagedFileError, InputError, StageFailed
from pipelines.preparation.against import difference
from pipelines.preparation.ahead import mapped_ahead
from pipelines.preparation.decode_process import DECODER, Rules
from pipelines.preparation.report import (
    PrepareResult,
    Totals,
    reasons,
    record,
    remedy,
    start_tracking,
)
from pipelines.preparation.source_plan import (
    MEGABYTE,
    NO_CLASS_COUNTS,
    SourcePlan,
    check_identity,
    make_plan,
    read_plan,
)
from pipelines.preparation.unit import (
    PART_NAME,
    PrepareTask,
    Receipt,
    process_unit,
    read_receipt,
    receipt_uri,
)
from pipelines.steps import ray_is_there, say, say_step
from pipelines.tables.image_files import REJECTED_SCHEMA, Part
from pipelines.tables.image_table import (
    IGNORED,
    MANIFEST,
    REJECTED,
    ImageParts,
    ImageTable,
    commit_manifest,
)
from pipelines.units import (
    Outcome,
    attempt,
    counted_attempts,
    outcome_table,
    outcomes,
    rounds,
    work_uri,
)

THREADS = 16


def run(
    config: PrepareConfig,
    *,
    decoder: str = DECODER,
    start_ray: Callable[[], None] = ray_is_there,
) -> PrepareResult:
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
    older = ImageParts.open(config.against) if config.against else None
    result = _run(config, output, decoder, start_ray)
    if older is None:
        return result
    found = difference(ImageParts.open(output), older)
    return dataclasses.replace(result, against=str(found))


def _run(
    config: PrepareConfig, output: str, decoder: str, start_ray: Callable[[], None]
) -> PrepareResult:
    if _is_finished(output) and not _has_leftovers(output):
        lease.clear(output, config.lease, stage="prepare")
        return _finished(config, output)
    try:
        # Nobody waits to be refused; of two that plan at once, one plan is created.
        plan = read_plan(config, output)
        # A plan may be gone for the best of reasons.
        if plan is None and not _is_finished(output):
            plan = make_plan(config, output)
    except Exception:
        # Another driver may have finished the table and cleared its working files away.
        if not _is_finished(output):
            raise
        return _finished(config, output)
    start_ray()
    with lease.held(output, config.lease, stage="prepare") as holder:
        if plan is None or _is_finished(output):
            result = _finished(config, output)
        else:
            result = _prepare(config, output, plan, decoder, holder.fence)
        _clear(output)
        holder.done()
    return result


def _prepare(
    config: PrepareConfig, output: str, plan: SourcePlan, decoder: str, fence: lease.Fence
) -> PrepareResult:
    """All units that are not done, and the table of all of them."""
    totals = Totals(config, plan, _receipts(output, plan))
    with start_tracking(config, work_uri(output, "run.json"), fence.check) as tracked:
        try:
            _run_units(config, output, plan, totals, decoder, fence)
            fence.check()
            result = _commit(config, output, plan)
        except StageFailed:
            fence.check()  # which says it better
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(totals.units)} of {len(plan.listings)} units are done; the same command "
                "goes on from here."
            ) from None
        record(tracked, result, totals.source_bytes)
    return dataclasses.replace(result, run_id=tracked.run_id)


# Before


def _is_finished(output: str) -> bool:
    return storage.exists(storage.join(output, MANIFEST))


def _finished(config: PrepareConfig, output: str) -> PrepareResult:
    table = ImageTable.open(output)
    table.check_parts()
    source = table.manifest["source"]["uri"]
    check_identity(config, output, {"source": source, **table.manifest["options"]})
    result = PrepareResult.of(output, table.manifest, already_done=True)
    say(f"prepare: already done, {result.num_rows:,} images; nothing to do")
    return result


def _receipts(output: str, plan: SourcePlan) -> Iterator[dict[str, Any]]:
    """Summaries of the units that are done; receipts that are damaged or lack parts go."""
    # Parts are written before their receipts, so they are listed after them: another driver may be
    # at work.
    receipts = storage.list_files(work_uri(output, "receipts"), ".json")
    sizes = {
        file.path: file.size for file in storage.list_files(output, ".parquet", recursive=False)
    }
    names = (file.path.removesuffix(".json") for file in receipts)
    units = [int(name) for name in names if name.isdecimal()]

    def check(unit: int) -> dict[str, Any] | None:
        with suppress(DamagedFileError):
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
    plan: SourcePlan,
    totals: Totals,
    decoder: str,
    fence: lease.Fence,
) -> None:
    todo = [unit for unit in range(len(plan.listings)) if unit not in totals.units]
    task = PrepareTask(
        output=output,
        fence=fence,
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
        digits=max(5, len(str(len(plan.listings) - 1))),
    )
    progress, before = totals.progress(), totals.done
    if todo:
        say_step("waiting for the first unit")
    try:
        for number, outcome in enumerate(_outcomes(task, plan, todo, config.num_tasks)):
            if number == 0:
                progress.counted_from(before, outcome.facts["seconds"])
            totals.add(outcome.facts)
            totals.show(progress)
            totals.check(final=False)
    finally:
        progress.close()
    totals.check(final=True)


def _outcomes(
    task: PrepareTask, plan: SourcePlan, todo: Sequence[int], num_tasks: int
) -> Iterator[Outcome]:
    """Runs units as a Ray Data job; outcomes come as units finish."""
    if not todo:
        return
    units = ({"unit": unit, "listing": plan.listings[unit]} for unit in todo)
    with counted_attempts() as attempts:
        for dataset in rounds(units):
            # A worker that is killed costs its unit, which Ray gives to another one.
            finished = dataset.map_batches(
                process,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"task": task, "attempts": attempts},
                num_cpus=1,
                compute=ray.data.TaskPoolStrategy(size=num_tasks or None),
            )
            yield from outcomes(finished)


def process(batch: pa.Table, task: PrepareTask, attempts: ActorHandle | None) -> pa.Table:
    """In the worker: units to their outcomes."""
    units = (json.loads(text) for text in batch.column("unit").to_pylist())
    return outcome_table(_outcome(task, attempts, **unit) for unit in units)


def _outcome(task: PrepareTask, attempts: ActorHandle | None, unit: int, listing: str) -> Outcome:
    with attempt(attempts, f"unit {unit}") as deaths:
        try:
            began = time.monotonic()
            facts = process_unit(task, unit, listing, deaths=deaths)
            return Outcome(unit=unit, facts={**facts, "seconds": time.monotonic() - began})
        except (InputError, StageFailed, OSError) as error:
            return Outcome.of_error(unit, str(unit), error)


# After


def _commit(config: PrepareConfig, output: str, plan: SourcePlan) -> PrepareResult:
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
                    columns = [list(column) for column in zip(*rows, strict=True)]
                    writer.write_table(pa.table(columns, schema=REJECTED_SCHEMA))
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


def _all_receipts(output: str, plan: SourcePlan) -> Iterator[Receipt]:
    units = range(len(plan.listings))
    return mapped_ahead(lambda unit: read_receipt(output, unit), units, num_threads=THREADS)


def _class_names(plan: SourcePlan, max_label: int) -> Sequence[str]:
    return plan.reader.class_names or [str(number) for number in range(max_label + 1)]


def _delete_other_parts(output: str, names: set[str]) -> None:
    """Parts of an earlier plan, whose working files were removed by hand, belong to no table.

    What others call their files (Spark: `part-00000-` and more) stays.
    """
    for file in storage.list_files(output, ".parquet", recursive=False):
        if PART_NAME.fullmatch(file.path) and file.path not in names:
            storage.delete(storage.join(output, file.path))


def _has_leftovers(output: str) -> bool:
    """Whether a driver was killed between the manifest and the clearing."""
    return bool(_half_written(output)) or storage.exists(work_uri(output))


def _half_written(output: str) -> list[Path]:
    if not storage.is_local(output):
        return []
    names = ("part-*", MANIFEST, REJECTED, IGNORED)
    return [left for name in names for left in Path(output).glob(f".{name}.*.tmp")]


def _clear(output: str) -> None:
    """Removes what is of no use beside a finished table: working files, half-written ones."""
    with suppress(OSError):
        for left in _half_written(output):
            left.unlink(missing_ok=True)
        storage.delete_prefix(work_uri(output))
