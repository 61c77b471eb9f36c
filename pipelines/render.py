"""The `render` stage: pixels of every view of every image, stored once.

Training then reads one view of 224 pixels instead of a photograph. It is optional: the same
training without a view table renders as it goes. Kill it anywhere and run the same command again:
at most the units in flight are done twice, and the table is that of an undisturbed run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import ray

from pipelines import lease, pictures, storage, tracking, unit_tables
from pipelines.config.checks import flatten
from pipelines.config.render import RenderConfig
from pipelines.errors import InputError
from pipelines.preflight import Bundle
from pipelines.preflight.capacity import autoscaled, shortages
from pipelines.progress import Progress
from pipelines.rendering import work as render_work
from pipelines.rendering.files import RenderTask, row_groups
from pipelines.rendering.plan import RenderPlan
from pipelines.rendering.result import RenderResult
from pipelines.steps import ray_is_there, say, say_step
from pipelines.tables.image_table import ImageParts
from pipelines.tables.view_files import check_file, decode_view
from pipelines.tables.view_table import ViewTable, build_manifest
from pipelines.tokenization.ledger import Ledger, Units
from pipelines.tokenization.work import Unit
from pipelines.unit_pools import outcomes_of
from pipelines.unit_tables import kept
from pipelines.units import Outcome, work_uri

NUM_PICTURES = 8


def run(config: RenderConfig, *, start_ray: Callable[[], None] = ray_is_there) -> RenderResult:
    """Makes the view table, or goes on with it.

    Raises:
        InputError: an input is missing or does not fit, or the output was begun with others.
        StageFailed: too many units rejected.
        KeyboardInterrupt: stopped by the user; what is done stays done.
    """
    for name in ("images", "output"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give a URI with --{name}")
    images = ImageParts.open(config.images)
    images.check_parts()
    if not images.num_rows:
        raise InputError(f"{images.uri}: the image table has no rows; prepare images first")
    plan = RenderPlan.of(config, images)
    task = plan.task
    # What can be refused is refused before anything is waited for or written.
    ledger, done = plan.take_up()
    if done and not storage.exists(work_uri(task.output)):
        if not config.dry_run:
            lease.clear(task.output, config.lease, stage="render")
        return _already_done(config, ledger)
    if config.dry_run:
        return _dry_run(config, task, ledger)
    start_ray()
    _check_room(task)
    with lease.held(task.output, config.lease, stage="render") as holder:
        ledger, done = plan.take_up(holder.fence)
        # Who had the lease before may have finished the table.
        result = _already_done(config, ledger) if done else _render(plan, ledger, images)
        ledger.clear()
        holder.done()
    return result


def _check_room(task: RenderTask) -> None:
    """Raises InputError where no node has what a task needs, and none is to come."""
    bundle = Bundle(
        field="task_cpus",
        count=1,
        resources={"CPU": task.num_cpus, "memory": task.memory},
        remedy="lower it, rows_per_unit or num_views, or add nodes",
    )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for missing in shortages([bundle], nodes):
        if not autoscaled():
            raise InputError(missing)
        say_step(f"{missing}; the autoscaler is asked")


def _already_done(config: RenderConfig, ledger: Ledger) -> RenderResult:
    table = ViewTable.open(ledger.uri)
    say(f"{ledger.uri}: already done, {table.num_rows:,} images; nothing to do")
    return _result(config, ledger, table.fingerprint, computed=0, seconds=0)


def _dry_run(config: RenderConfig, task: RenderTask, ledger: Ledger) -> RenderResult:
    unverified = 0 if ledger.finished else len(ledger.load())
    identity = task.identity
    say(
        f"would render views {list(range(*identity.views))} of {identity.num_rows:,} images "
        f"({task.images_uri}) at {identity.image_size} px as {identity.form} into {task.output}: "
        f"{len(ledger.todo()):,} of {len(ledger.units):,} units to do ({unverified:,} to verify)"
    )
    return _result(config, ledger, "", computed=0, seconds=0)


def _render(plan: RenderPlan, ledger: Ledger, images: ImageParts) -> RenderResult:
    """What is not done, and the table of all of it."""
    config, task = plan.config, plan.task
    unverified = np.zeros(0, np.int64)
    if not ledger.finished:
        ledger.claim(plan.wanted)
        unverified = ledger.load()
    if config.retry_rejected:
        ledger.retry_rejected()
    source = tracking.Dataset.of_table("image_table", images, "views")
    params = flatten(asdict(config)) | flatten(task.identity.to_dict())
    with tracking.start_run(
        config.tracking, stage="render", params=params, inputs=[source], output=task.output
    ) as record:
        if len(unverified):
            check = partial(check_file, task.identity)
            unit_tables.verify(
                ledger,
                unverified,
                check,
                lambda unit: _row_groups(ledger.units, images, unit, task),
                num_cpus=task.num_cpus,
            )
        computed, seconds = _compute(config, task, ledger, images)
        unit_tables.check_complete(ledger, config.max_rejected_units)
        manifest = build_manifest(
            identity=task.identity,
            parts=images.parts,
            files=ledger.files(),
            rejected=ledger.rejected_units(),
            rows_per_unit=config.rows_per_unit,
            libraries=plan.wanted["libraries"],
        )
        ledger.commit(manifest)
        table = ViewTable.open(task.output)
        result = _result(config, ledger, table.fingerprint, computed=computed, seconds=seconds)
        record.set_output(
            tracking.Dataset(name="view_table", uri=task.output, digest=table.fingerprint)
        )
        record.set_note(result.summary())
        _log(record, table, result)
    return result


def _compute(
    config: RenderConfig, task: RenderTask, ledger: Ledger, images: ImageParts
) -> tuple[int, float]:
    """Runs what is to do; returns units done and the seconds they took."""
    todo, before = ledger.todo(), ledger.rows_done
    if not len(todo):
        say("render: every unit is there; the table is closed")
        return 0, 0.0
    if before:
        say(f"going on: {before:,} of {images.num_rows:,} images are done")
    say_step("waiting for the first unit")
    progress = Progress(images.num_rows, "render", "images", initial=ledger.rows_settled)
    begin, computed = time.monotonic(), 0
    with kept(ledger, progress, images.num_rows):
        for outcome in _outcomes(task, ledger.units, todo, images):
            if not computed and outcome.facts:  # starting up belongs to no rate
                begin = time.monotonic() - sum(outcome.facts["seconds"].values())
                progress.counted_from(before, time.monotonic() - begin)
            if not outcome.suspect:
                computed += unit_tables.book(outcome, ledger, config.max_rejected_units)
            progress.update(ledger.rows_settled, rejected=len(ledger.rejected))
            ledger.save_now_and_then()
    return computed, time.monotonic() - begin


def _outcomes(
    task: RenderTask, units: Units, todo: np.ndarray, images: ImageParts
) -> Iterator[Outcome]:
    return outcomes_of(
        todo,
        lambda unit: unit_of(units, images, unit),
        lambda given, attempts: render_work.run_in_pool(given, task, attempts),
        lambda aside: render_work.run_alone(aside, task),
        workers=1,
    )


def _row_groups(units: Units, images: ImageParts, unit: int, task: RenderTask) -> list[int]:
    """Row groups of the file of a unit."""
    start, stop = int(units.start[unit]), int(units.stop[unit])
    return row_groups(images.parts[units.part[unit]], start, stop, task.identity.row_group_rows)


def unit_of(units: Units, images: ImageParts, unit: int) -> Unit:
    """A unit as it travels to a worker."""
    return Unit(
        index=unit,
        part=images.parts[units.part[unit]].to_dict(),
        start=int(units.start[unit]),
        stop=int(units.stop[unit]),
    )


def _result(
    config: RenderConfig, ledger: Ledger, fingerprint: str, *, computed: int, seconds: float
) -> RenderResult:
    rows = ledger.units.sizes.mean() * computed
    return RenderResult(
        uri=ledger.uri,
        fingerprint=fingerprint,
        num_rows=int(ledger.units.sizes.sum()),
        num_views=config.num_views,
        num_units=len(ledger.units),
        units_computed=computed,
        rejected_units=len(ledger.rejected),
        seconds=seconds,
        images_per_second=float(rows / seconds) if seconds else 0.0,
        num_bytes=int(ledger.size[ledger.done].sum()),
    )


def _log(run: tracking.Run, table: ViewTable, result: RenderResult) -> None:
    """Figures, and pictures of the first views, read back from the table."""
    if not run.run_id:
        return
    metrics = {"bytes": float(result.num_bytes), "rejected_units": float(result.rejected_units)}
    if result.units_computed:
        metrics["images_per_second_total"] = result.images_per_second
    run.log_metrics(metrics)
    identity = table.identity
    first = int(np.searchsorted(table.row_groups.starts, table.file_rows(0).start))
    shown = [
        [
            decode_view(row["image"], identity.form, identity.image_size, key=row["key"])
            for row in table.read_group(first, slot).slice(0, NUM_PICTURES).to_pylist()
        ]
        for slot in range(min(2, identity.num_views))
    ]
    pixels = np.stack([pixels for column in shown for pixels in column])
    run.log_image("views", pictures.contact_sheet(pixels, title=f"Stored views ({identity.form})"))
