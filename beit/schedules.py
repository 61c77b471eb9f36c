"""Learning-rate schedule: a pure function of the step."""

import math


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, final: float
) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine towards `final`.

    `step` counts optimiser updates from 0. The first warm-up step has value 0 and the last has
    `peak`; the cosine starts at `peak` again and would reach `final` at `total_steps`, one step
    after the last; later steps stay at `final`. Equal to the array that microsoft/unilm
    (`beit/utils.py`, `cosine_scheduler`) builds, without building it.

    ValueError for a negative step, or a warm-up as long as the whole run.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} must be at least 0 and below total_steps {total_steps}"
        )
    if step < warmup_steps:
        if step == warmup_steps - 1 and warmup_steps > 1:
            return peak  # exactly, not by rounding luck
        return step * (peak / max(warmup_steps - 1, 1))
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
