"""Going on after an interruption: what a checkpoint says, and the way back to the newest one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipelines.config.checks import to_dict
from pipelines.redaction import redacted_values
from pipelines.training.checkpoint import Saver, resume_point
from pipelines.training.distributed import World, restore
from pipelines.training.health import HealthMonitor
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import Skips


def resume(
    log: TrainLog,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: HealthMonitor,
) -> int | None:
    """Loads the newest whole checkpoint: its step, or None if there is none."""
    found = resume_point(log.run.checkpoints, world, rejected=log.checkpoint_rejected)
    if found is None:
        return None
    restore(model, optimizer, found.weights, found.moments)
    monitor.restore(found.state["health"])
    return found.step


def roll_back(
    log: TrainLog,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: HealthMonitor,
    saver: Saver,
    skips: Skips,
    step: int,
) -> tuple[int, Skips]:
    """From `step` to the newest checkpoint, leaving out the data since: its step, and all skips."""
    world.broadcast(saver.wait() if world.rank == 0 else None)
    back = resume(log, world, model, optimizer, monitor)
    assert back is not None, "a checkpoint is made before the first step"
    skipped = skips.position(step) - skips.position(back)
    skips = skips.add(from_step=back, batches=skipped)
    if world.rank == 0:
        log.run.write_skips(skips)
    log.rewind(back)
    log.event(
        "rolled_back",
        step=step,
        to_step=back,
        skipped_batches=skipped,
        message=f"back to step {back}; {skipped} batches are skipped",
    )
    return back, skips


def checkpoint_state(
    config: Any,
    fingerprints: Mapping[str, Any],
    monitor: HealthMonitor,
    skips: Skips,
    precision: str,
) -> dict[str, Any]:
    """What a checkpoint says beside tensors."""
    return {
        "config": redacted_values(to_dict(config)),
        "fingerprints": dict(fingerprints),
        "health": monitor.state(),
        "skips": skips.entries,
        # No generator has a state to save: order, views, masks and drop-path are functions of
        # these and of the step. bf16 needs no loss scaler.
        "rng": {"seed": config.seed, "state": "functions of (seed, step) and (seed, image, epoch)"},
        "scaler": None,
        "precision": precision,
        "torch": torch.__version__,
    }
