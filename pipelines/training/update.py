"""One update of the weights: the rates of its step, loss scale, clipping, and AdamW."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from beit.schedules import warmup_cosine
from pipelines.config.pretrain import OptimConfig
from pipelines.training.distributed import clip_gradients

if TYPE_CHECKING:  # a benchmark of `beit` alone takes an update, and no driver
    from pipelines.training.weights_run import TrainPlan


def adamw(groups: Sequence[Mapping[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW of such groups, see `beit.optim.parameter_groups`."""
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def set_rates(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, plan: "TrainPlan", step: int
) -> dict[str, float]:
    """Sets what is scheduled, a pure function of the step, and returns it for the log."""
    lr = warmup_cosine(
        step,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        peak=optim.lr,
        final=optim.min_lr,
    )
    rates = {"lr": lr}
    if optim.weight_decay_end is not None:
        rates["weight_decay"] = warmup_cosine(
            step,
            total_steps=plan.total_steps,
            warmup_steps=0,
            peak=optim.weight_decay,
            final=optim.weight_decay_end,
        )
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["weight_decay"] > 0:
            group["weight_decay"] = rates.get("weight_decay", group["weight_decay"])
    return rates


def update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
    clip_grad_norm: float | None,
) -> Tensor:
    """Clips and steps; returns the norm of the gradients before, on the device.

    An update with a gradient that is not finite is left out on the device itself, so nothing has
    to be waited for and no weight is ever lost to it. Gradients, and with them what is left out
    and the scale after it, are the same on all workers.
    """
    scaler.unscale_(optimizer)
    norm = clip_gradients(parameters, clip_grad_norm)
    # A scaler that is on replaces this by what it has found itself.
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
