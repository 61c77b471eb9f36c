"""The `tokenize` stage: visual tokens of every view of every image, computed once.

Kill it anywhere and run the same command again: at most the units in flight are computed twice,
and the table is the same, byte for byte, as that of an undisturbed run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from beit.tokenizers import ImageTokenizer
from pipelines import lease, render, storage, tracking, unit_tables
from pipelines.config.checks import flatten, require
from pipelines.config.tokenize_images import TokenizeConfig, refuse_idle_views, stored_views
from pipelines.errors import InputError
from pipelines.progress import Progress
from pipelines.rendering.alongside import Alongside, alongside
from pipelines.rendering.plan import RenderPlan
from pipelines.steps import ray_is_there, say, say_step
from pipelines.tables.image_table import ImageParts
from pipelines.tables.token_files import check_file
from pipelines.tables.token_table import TokenTable, build_manifest, read_manifest
from pipelines.tokenization import pool as token_pool
from pipelines.tokenization import report as token_report
from pipelines.tokenization import task as token_task
from pipelines.tokenization.gate import Gate
from pipelines.tokenization.ledger import Ledger, Units, plan_units
from pipelines.tokenization.report import TokenizeResult
from pipelines.tokenization.reuse import Origins, find_origins, older_tables, reused_datasets
from pipelines.tokenization.task import TokenizeTask
from pipelines.tokenization.work import Unit
from pipelines.unit_pools import outcomes_of
from pipelines.unit_tables import kept
from pipelines.units import Outcome, work_uri


def run(config: TokenizeConfig, *, start_ray: Callable[[], None] = ray_is_there) -> TokenizeResult:
    """Makes the token table, or goes on with it; and the view table of `store_views`.

    Raises:
        InputError: an input is missing or does not fit, or the output was begun with others.
        StageFailed: too many units rejected, or the tokenizer has collapsed.
        KeyboardInterrupt: stopped by the user; what is done stays done.
    """
    for name in ("images", "tokenizer", "output"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give a URI with --{name}")
    if not config.store_views:
        refuse_idle_views(config)
    images = ImageParts.open(config.images)
    images.check_parts()
    tokenizer = token_task.load_tokenizer(config)
    units = plan_units(
        [part.name for part in images.parts],
        [part.rows for part in images.parts],
        config.rows_per_unit,
    )
    if not len(units):
        raise InputError(f"{images.uri}: the image table has no rows; prepare images first")
    stored = _stored_views(config, images)
    result = _make_tokens(config, images, tokenizer, units, stored, start_ray)
    if stored is None:
        return result
    with _named_as_here():  # What the pass left, and the manifest.
        return replace(result, views=render.run(stored.config, start_ray=start_ray))


def _stored_views(config: TokenizeConfig, images: ImageParts) -> RenderPlan | None:
    """The view table that is made in the same pass.

    Raises:
        InputError: it was made, or begun, with other options, or is where the tokens go.
    """
    wanted = stored_views(config)
    if wanted is None:
        return None
    plan = RenderPlan.of(wanted, images)
    apart = plan.task.output.rstrip("/") != storage.absolute(config.output).rstrip("/")
    require(apart, "store_views", config.store_views, "give another URI than --output")
    with _named_as_here():
        plan.take_up()
    return plan


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Refusals of `render`, whose fields have other names, say which of `tokenize` they mean."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"store_views (view_form, view_size, view_rows_per_unit): {error}"
        ) from error


def _make_tokens(
    config: TokenizeConfig,
    images: ImageParts,
    tokenizer: ImageTokenizer,
    units: Units,
    stored: RenderPlan | None,
    start_ray: Callable[[], None],
) -> TokenizeResult:
    output = storage.absolute(config.output)
    libraries = token_task.known_libraries()
    options = {"rows_per_unit": config.rows_per_unit, "libraries": libraries}
    # What can be refused is refused before anything is waited for or written: first without Ray.
    known = token_task.settled(config, images, tokenizer)
    done = _take_up(config, ledger := Ledger(output, units), known | options)
    if done and not storage.exists(work_uri(output)):
        if not config.dry_run:
            lease.clear(output, config.lease, stage="tokenize")
        return _already_done(config, ledger)
    # A table that is done needs none of those that it was copied from.
    older = () if done else older_tables(config, images, known, libraries)
    start_ray()  # how it is computed follows from what the cluster has
    views = stored.task if stored else None
    task = token_task.plan_task(config, images, tokenizer, older, views)
    wanted = task.identity.to_dict() | options
    _take_up(config, ledger := Ledger(output, units), wanted)
    if config.dry_run:
        unverified = np.zeros(0) if ledger.finished else ledger.load()
        return _dry_run(task, ledger, len(unverified))
    with lease.held(task.output, config.lease, stage="tokenize") as holder:
        ledger = Ledger(task.output, units, holder.fence)
        # Who had the lease before may have finished the table.
        if _take_up(config, ledger, wanted):
            result = _already_done(config, ledger)
        else:
            result = _tokenize(config, task, ledger, images, options, stored)
        ledger.clear()
        holder.done()
    return result


def _take_up(config: TokenizeConfig, ledger: Ledger, wanted: dict[str, Any]) -> bool:
    """Takes over a finished table, less the files that are gone; whether nothing is left to do.

    Raises:
        InputError: the output was made, or begun, with other options.
    """
    return unit_tables.take_up(ledger, wanted, read_manifest, retry_rejected=config.retry_rejected)


def _already_done(config: TokenizeConfig, ledger: Ledger) -> TokenizeResult:
    table = TokenTable.open(ledger.uri)
    say(f"{ledger.uri}: already done, {table.num_rows:,} images; nothing to do")
    return _result(config, ledger, table, computed=0, seconds=0)


def _tokenize(
    config: TokenizeConfig,
    task: TokenizeTask,
    ledger: Ledger,
    images: ImageParts,
    options: dict[str, Any],
    stored: RenderPlan | None,
) -> TokenizeResult:
    """What is not done, and the table of all of it."""
    unverified = np.zeros(0, np.int64)
    if not ledger.finished:
        ledger.claim(task.identity.to_dict() | options)
        unverified = ledger.load()
    if config.retry_rejected:
        ledger.retry_rejected()
    inputs = [
        tracking.Dataset.of_table("image_table", images, "tokens"),
        tracking.Dataset(
            name="tokenizer", uri=task.tokenizer_uri, digest=task.identity.tokenizer_fingerprint
        ),
        *reused_datasets(task.older),
    ]
    params = flatten(asdict(config)) | flatten(task.identity.to_dict())
    with tracking.start_run(
        config.tracking, stage="tokenize", params=params, inputs=inputs, output=task.output
    ) as record:
        if len(unverified):
            check = partial(check_file, task.identity)
            unit_tables.verify(
                ledger, unverified, check, ledger.units.rows, num_cpus=task.decode_cpus
            )
        with alongside(stored, ledger.units) as views:
            computed, seconds, reused = _compute(config, task, ledger, images, record, views)
        unit_tables.check_complete(ledger, config.max_rejected_units)
        table = _commit(task, ledger, images, config.rows_per_unit, options["libraries"])
        result = _result(config, ledger, table, computed=computed, seconds=seconds, reused=reused)
        record.set_output(
            tracking.Dataset(name="token_table", uri=task.output, digest=table.fingerprint)
        )
        record.set_note(result.summary())
        token_report.log(record, images, table, task.tokenizer_uri, result)
    return result


def _dry_run(task: TokenizeTask, ledger: Ledger, unverified: int) -> TokenizeResult:
    identity, units = task.identity, ledger.units
    todo = ledger.todo()
    say(
        f"would tokenize views {list(range(*identity.views))} of {identity.num_rows:,} images "
        f"({task.images_uri}) at {identity.image_size} px with {identity.precision} into "
        f"{task.output}: {len(todo):,} of {len(units):,} units to do ({unverified:,} to verify), "
        f"{len(ledger.rejected):,} rejected, {task.min_actors} to {task.max_actors} encoders on "
        f"{task.device}"
    )
    return TokenizeResult(
        uri=task.output,
        fingerprint="",
        num_rows=identity.num_rows,
        num_views=identity.num_views,
        num_units=len(units),
        units_computed=0,
        images_reused=0,
        rejected_units=len(ledger.rejected),
        seconds=0.0,
        images_per_second=0.0,
        codes_used=0,
        perplexity=0.0,
    )


def _compute(
    config: TokenizeConfig,
    task: TokenizeTask,
    ledger: Ledger,
    images: ImageParts,
    record: tracking.Run,
    views: Alongside | None,
) -> tuple[int, float, int]:
    """Runs what is to do; returns units done, the seconds they took, and rows that were copied."""
    todo = ledger.todo()
    before = ledger.rows_done
    if before:
        say(f"going on: {before:,} of {images.num_rows:,} images are done")
    say(
        f"tokenize: {task.min_actors} to {task.max_actors} encoders on {task.device} in "
        f"{task.identity.precision}"
    )
    origins = find_origins(images, task.older) if len(todo) else None
    meter = token_report.Meter(record)
    progress = Progress(images.num_rows, "tokenize", "images", initial=ledger.rows_settled)
    gate = Gate(config, task, ledger)
    begin = time.monotonic()
    if len(todo):
        say_step("waiting for the first unit: encoders start")
    computed = reused = 0
    with ExitStack() as last, kept(ledger, progress, images.num_rows):
        last.callback(meter.flush)
        gate.check()
        for outcome in _outcomes(task, ledger.units, gate.first(todo), images, origins, views):
            if not computed and outcome.facts:  # starting up belongs to no rate
                begin = meter.begin = max(begin, token_report.began(outcome))
                progress.counted_from(before, time.monotonic() - begin)
            if outcome.suspect:
                gate.skip(outcome.unit)
            elif unit_tables.book(outcome, ledger, config.max_rejected_units):
                computed += 1
                reused += outcome.facts["reused"]
                if views:
                    views.book(outcome.facts["views"])
            meter.add(outcome, ledger.units.rows(outcome.unit))
            progress.update(
                ledger.rows_settled, rejected=len(ledger.rejected), waiting=meter.waiting()
            )
            ledger.save_now_and_then()
            gate.check()
        gate.check(last=True)
    seconds = time.monotonic() - begin
    if computed:
        meter.advise()
    return computed, seconds, reused


def _outcomes(
    task: TokenizeTask,
    units: Units,
    todo: np.ndarray,
    images: ImageParts,
    origins: Origins | None,
    views: Alongside | None,
) -> Iterator[Outcome]:
    return outcomes_of(
        todo,
        lambda unit: _unit(units, images, unit, origins, views),
        lambda given, attempts: token_pool.run_in_pool(given, task, attempts),
        lambda aside: token_pool.run_alone(aside, task),
        workers=task.max_actors,
    )


def _unit(
    units: Units,
    images: ImageParts,
    unit: int,
    origins: Origins | None,
    views: Alongside | None,
) -> Unit:
    first, rows = int(units.first[unit]), units.rows(unit)
    return Unit(
        index=int(unit),
        part=images.parts[units.part[unit]].to_dict(),
        start=int(units.start[unit]),
        stop=int(units.stop[unit]),
        reused=origins.runs(first, first + rows) if origins else (),
        views=views.of(unit) if views else (),
    )


def _commit(
    task: TokenizeTask,
    ledger: Ledger,
    images: ImageParts,
    rows_per_unit: int,
    libraries: dict[str, str],
) -> TokenTable:
    manifest = build_manifest(
        identity=task.identity,
        part_names=[part.name for part in images.parts],
        part_rows=[part.rows for part in images.parts],
        files=ledger.files(),
        rejected=ledger.rejected_units(),
        rows_per_unit=rows_per_unit,
        libraries=libraries,
    )
    ledger.commit(manifest)
    return TokenTable.open(task.output)


def _result(
    config: TokenizeConfig,
    ledger: Ledger,
    table: TokenTable,
    *,
    computed: int,
    seconds: float,
    reused: int = 0,
) -> TokenizeResult:
    usage = token_report.table_usage(table)
    rows = int(ledger.units.sizes.mean() * computed)
    return TokenizeResult(
        uri=ledger.uri,
        fingerprint=table.fingerprint,
        num_rows=table.num_rows,
        num_views=config.num_views,
        num_units=len(ledger.units),
        units_computed=computed,
        images_reused=reused,
        rejected_units=len(ledger.rejected),
        seconds=seconds,
        images_per_second=rows / seconds if seconds else 0.0,
        codes_used=usage.codes_used,
        perplexity=usage.perplexity,
    )
