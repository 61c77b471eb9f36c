"""What the workers of the `render` stage do with one unit: read, render all views, store, write."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from beit.views import Interpolation, ViewPolicy, view_of
from pipelines import storage, unit_pools
from pipelines.reading.pixels import DamagedImageError, drawn, render_encoded
from pipelines.tables.image_files import Part, read_part
from pipelines.tables.view_files import (
    ROW_GROUP_ROWS,
    ViewIdentity,
    cut_row_groups,
    encode_file,
    encode_view,
    schema,
)
from pipelines.tokenization.ledger import Units, units_of
from pipelines.tokenization.work import Unit
from pipelines.unit_pools import tried_in_pool
from pipelines.units import Outcome, outcome_table, outcomes, rounds

INTERPOLATION: Interpolation = "bicubic"


@dataclass(frozen=True, kw_only=True)
class RenderTask:
    """What every worker is told."""

    images_uri: str
    output: str
    identity: ViewIdentity
    num_cpus: float
    rows_per_unit: int

    @property
    def memory(self) -> int:
        """Bytes a task needs: all stored views of a unit, and the file made of them."""
        identity = self.identity
        return 3 * self.rows_per_unit * identity.num_views * 3 * identity.image_size**2


def plan_units(parts: Sequence[Part], rows_per_unit: int) -> Units:
    """Units of at most `rows_per_unit` rows, or of one row group: whole ones, as many as fit."""
    bounds: list[tuple[int, int, int]] = []
    for number, part in enumerate(parts):
        start = stop = 0
        for rows in [*cut_row_groups(part.row_groups, ROW_GROUP_ROWS), 0]:
            last = not rows
            if stop > start and (last or stop + rows - start > rows_per_unit):
                bounds.append((number, start, stop))
                start = stop
            stop += rows
    columns = np.array(bounds, np.int64).reshape(-1, 3).T
    return units_of([part.name for part in parts], [part.rows for part in parts], *columns)


def stored_views(data: bytes, digest: bytes, identity: ViewIdentity, *, key: str) -> list[bytes]:
    """All views of one encoded image as they are stored, slot by slot; it is decoded once.

    Raises:
        DamagedImageError: it does not decode.
    """
    policy, size = ViewPolicy.from_dict(identity.policy), identity.image_size
    views = range(*identity.views)
    shown = [view_of(digest, slot, views) for slot in range(len(views))]
    rendered = render_encoded(
        data, digest, [drawn(policy, view) for view in shown], [(size, INTERPOLATION)], key=key
    )
    return [encode_view(pixels, identity.form) for pixels in rendered]


def render_unit(unit: Unit, task: RenderTask) -> Outcome:
    """Makes a unit's file. What cannot be made says so; work that failed is set aside."""
    try:
        return _render(unit, task)
    except DamagedImageError as error:
        return Outcome(unit=unit.index, rejected=str(error))
    except Exception as error:
        return Outcome.of_error(unit.index, unit.name, error)


def _render(unit: Unit, task: RenderTask) -> Outcome:
    begin = time.monotonic()
    part, identity = Part.from_dict(unit.part), task.identity
    images = read_part(task.images_uri, part, unit.start, unit.stop, ["key", "image", "digest"])
    read = time.monotonic()
    slots: list[list[bytes]] = [[] for _ in range(identity.num_views)]
    for number in range(images.num_rows):
        row = {name: images[name][number].as_py() for name in images.column_names}
        stored = stored_views(row["image"], row["digest"], identity, key=row["key"])
        for slot, data in zip(slots, stored, strict=True):
            slot.append(data)
    rendered = time.monotonic()
    names = schema(identity)
    columns = [images["key"], images["digest"], *(pa.array(slot, pa.binary()) for slot in slots)]
    rows = pa.Table.from_arrays(columns, schema=names)
    data = encode_file(rows, row_groups(unit, task), identity)
    storage.write_bytes(storage.join(task.output, unit.name), data)
    seconds = {
        "read": read - begin,
        "render": rendered - read,
        "write": time.monotonic() - rendered,
    }
    facts = {"size": data.size, "hash": storage.digest(data), "seconds": seconds}
    return Outcome(unit=unit.index, facts=facts)


def row_groups(unit: Unit, task: RenderTask) -> list[int]:
    """Row groups of the unit's file: those between its first row and its last."""
    part = Part.from_dict(unit.part)
    cut = cut_row_groups(part.row_groups, task.identity.row_group_rows)
    starts = np.cumsum([0, *cut[:-1]])
    inside = (starts >= unit.start) & (starts < unit.stop)
    return [rows for rows, chosen in zip(cut, inside, strict=True) if chosen]


def render_batch(batch: pa.Table, task: RenderTask, attempts: ActorHandle | None) -> pa.Table:
    """Task: a unit in, its outcome out."""
    units = (Unit(**json.loads(text)) for text in batch.column("unit").to_pylist())
    return outcome_table(
        tried_in_pool(unit, lambda unit: render_unit(unit, task), attempts) for unit in units
    )


def run_in_pool(
    units: Iterable[Unit], task: RenderTask, attempts: ActorHandle
) -> Iterator[Outcome]:
    """Runs units as tasks; outcomes come in the order of completion."""
    for dataset in rounds(asdict(unit) for unit in units):
        yield from outcomes(
            dataset.map_batches(
                render_batch,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"task": task, "attempts": attempts},
                num_cpus=task.num_cpus,
                memory=task.memory,
            )
        )


def run_alone(units: Sequence[Unit], task: RenderTask) -> Iterator[Outcome]:
    """Tries units that were set aside in a process of their own."""
    resources: dict[str, Any] = {"num_cpus": task.num_cpus, "memory": task.memory}
    return unit_pools.run_alone(units, render_unit, task, **resources)
