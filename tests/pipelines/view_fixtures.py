"""View tables made without Ray, and what they should hold."""

from pipelines import render, storage
from pipelines.config.render import RenderConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.rendering import plan as render_plan
from pipelines.rendering import work as render_work
from pipelines.tables.unit_files import MANIFEST, UnitFile
from pipelines.tables.view_table import build_manifest


def render_config(images_uri, output, **changes):
    values = {
        "images": str(images_uri),
        "output": str(output),
        "num_views": 2,
        "image_size": 32,
        "rows_per_unit": 20,
        "tracking": {"enabled": False},
    } | changes
    values["tracking"] = TrackingConfig(**values["tracking"])
    return RenderConfig(**values)


def write_views(images, output, **changes):
    """The view table of an open image table, as `beit render` makes it."""
    config = render_config(images.uri, output, **changes)
    task = render_plan.plan_task(config, images)
    units = render_plan.plan_units(images.parts, config.rows_per_unit)
    files = []
    for number in range(len(units)):
        unit = render.unit_of(units, images, number)
        done = render_work.render_unit(unit, task).check()
        assert not done.rejected, done.rejected
        files.append(
            UnitFile(
                part=int(units.part[number]),
                start=unit.start,
                stop=unit.stop,
                size=done.facts["size"],
                hash=done.facts["hash"],
            )
        )
    manifest = build_manifest(
        identity=task.identity,
        parts=images.parts,
        files=files,
        rejected=[],
        rows_per_unit=config.rows_per_unit,
        libraries={},
    )
    storage.write_json(storage.join(task.output, MANIFEST), manifest)
    return task.output
