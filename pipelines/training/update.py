"""One update of the weights: the rates of its step, clipping, and AdamW."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beit.schedules import warmup_cosine
from pipelines.config.pretrain import OptimConfig
from pipelines.training.distributed import clip_gradients
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
    optimizer: torch.optim.Optimizer, optim: OptimConfig, plan: TrainPlan, step: int
) -> dict[str, float]:
    """Sets what is scheduled, a pure function of the step, and returns it for the log."""
    lr = warmup_cosine(
        step,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        peak=optim.lr,
        final=optim.min_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return {"lr": lr}


def update(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], optim: OptimConfig
) -> Tensor:
    """Clips and steps; returns the norm of the gradients before, on the device.

    An update with a gradient that is not finite is left out on the device itself, so nothing has
    to be waited for and no weight is ever lost to it.
    """
    norm = clip_gradients(parameters, optim.clip_grad_norm)
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
