"""What the workers of the `render` stage do with one unit: read, render all views, store, write."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from beit.views import ViewPolicy
from pipelines import unit_pools
from pipelines.reading.pixels import DamagedImageError, drawn, render_encoded
from pipelines.rendering.files import INTERPOLATION, RenderTask, ViewFile, in_slots
from pipelines.tables.image_files import Part, read_part
from pipelines.tables.view_files import ViewIdentity
from pipelines.tokenization.work import Unit
from pipelines.unit_pools import tried_in_pool
from pipelines.units import Outcome, outcome_table, outcomes, rounds


def rendered_views(
    data: bytes, digest: bytes, identity: ViewIdentity, *, key: str
) -> list[np.ndarray]:
    """All views of one encoded image, in their order; it is decoded once.

    Raises:
        DamagedImageError: it does not decode.
    """
    policy, size = ViewPolicy.from_dict(identity.policy), identity.image_size
    views = [drawn(policy, index) for index in range(*identity.views)]
    return render_encoded(data, digest, views, [(size, INTERPOLATION)], key=key)


def stored_views(data: bytes, digest: bytes, identity: ViewIdentity, *, key: str) -> list[bytes]:
    """`rendered_views` as they are stored, slot by slot."""
    return in_slots(rendered_views(data, digest, identity, key=key), digest, identity)


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
    file = ViewFile(task, part, unit.start, unit.stop)
    for number in range(images.num_rows):
        row = {name: images[name][number].as_py() for name in images.column_names}
        views = rendered_views(row["image"], row["digest"], identity, key=row["key"])
        file.add(row["key"], row["digest"], views)
    rendered = time.monotonic()
    size, digest = file.write()
    seconds = {
        "read": read - begin,
        "render": rendered - read,
        "write": time.monotonic() - rendered,
    }
    return Outcome(unit=unit.index, facts={"size": size, "hash": digest, "seconds": seconds})


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
