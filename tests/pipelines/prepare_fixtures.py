"""Pieces of a prepare that tests run without Ray."""

from pipelines.config.prepare import PrepareConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.preparation.source_plan import SourcePlan, make_plan
from pipelines.preparation.unit import PrepareTask, Rules, process_unit


def config_of(source: object, output: object, **fields) -> PrepareConfig:
    options = {"tracking": TrackingConfig(enabled=False)} | fields
    return PrepareConfig(source=str(source), output=str(output), **options)


def unit_task(config: PrepareConfig, plan: SourcePlan, **fields) -> PrepareTask:
    options = {
        "output": config.output,
        "reader": plan.reader,
        "rules": Rules(max_pixels=config.max_pixels),
        "decode_timeout": 60.0,
        "part_bytes": int(config.part_mb * 10**6),
        "row_group_bytes": int(config.row_group_mb * 10**6),
        "digits": 5,
    }
    return PrepareTask(**(options | fields))


def work_off(config: PrepareConfig) -> list[dict]:
    """Plans a prepare and does all its units, so that only the end is left; their summaries."""
    plan = make_plan(config, config.output)
    task = unit_task(config, plan)
    return [process_unit(task, unit, listing) for unit, listing in enumerate(plan.listings)]
