"""What a render will make, decided by its driver, and what of it is there already."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from pipelines import storage, unit_tables
from pipelines.config.render import RenderConfig
from pipelines.lease import Fence
from pipelines.rendering.files import INTERPOLATION, RenderTask
from pipelines.tables.image_files import Part
from pipelines.tables.image_table import ImageParts
from pipelines.tables.view_files import (
    CODECS,
    ROW_GROUP_ROWS,
    ViewIdentity,
    ViewIdentityRecord,
    cut_row_groups,
)
from pipelines.tables.view_table import read_manifest
from pipelines.tokenization.ledger import Ledger, Units, units_of

LIBRARIES = ("numpy", "pillow", "pyarrow")


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderPlan:
    """The view table that a configuration asks for."""

    config: RenderConfig
    task: RenderTask
    units: Units
    wanted: dict[str, Any]
    """The identity, and options: what the output must have been begun with."""

    @classmethod
    def of(cls, config: RenderConfig, images: ImageParts) -> "RenderPlan":
        task = plan_task(config, images)
        options = {
            "rows_per_unit": config.rows_per_unit,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        return cls(
            config=config,
            task=task,
            units=plan_units(images.parts, config.rows_per_unit),
            wanted=task.identity.to_dict() | options,
        )

    def take_up(self, fence: Fence | None = None) -> tuple[Ledger, bool]:
        """A ledger with what a finished table has, and whether nothing is left to do.

        Raises:
            InputError: the output was made, or begun, with other options.
        """
        ledger = Ledger(self.task.output, self.units, fence, form=ViewIdentityRecord)
        done = unit_tables.take_up(
            ledger, self.wanted, read_manifest, retry_rejected=self.config.retry_rejected
        )
        return ledger, done


def plan_task(config: RenderConfig, images: ImageParts) -> RenderTask:
    """What the workers must know."""
    identity = ViewIdentity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        policy=config.policy.to_dict(),
        views=(config.first_view, config.first_view + config.num_views),
        image_size=config.image_size,
        interpolation=INTERPOLATION,
        form=config.form,
        codec=CODECS[config.form],
        row_group_rows=ROW_GROUP_ROWS,
    )
    return RenderTask(
        images_uri=images.uri,
        output=storage.absolute(config.output),
        identity=identity,
        num_cpus=config.task_cpus,
        rows_per_unit=min(
            max(config.rows_per_unit, ROW_GROUP_ROWS), max(part.rows for part in images.parts)
        ),
    )


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
