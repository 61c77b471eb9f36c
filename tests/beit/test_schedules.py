"""The schedule against the array of the official code, formula for formula."""

import math

import numpy as np
import pytest

from beit.schedules import warmup_cosine


def official_array(peak, final, total, warmup):
    """The published formula (reference: warm-up linspace, then half a cosine)."""
    rest = total - warmup
    cosine = [
        final + 0.5 * (peak - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)
    ]
    return np.concatenate([np.linspace(0, peak, warmup), cosine])


@pytest.mark.parametrize(
    ("total", "warmup", "peak", "final"),
    [(187_500, 6_250, 1.5e-3, 1e-5), (1000, 0, 1.0, 0.0), (50, 1, 2.0, 0.5), (20, 19, 1e-3, 0)],
)
def test_every_step_equals_the_official_array(total, warmup, peak, final):
    expected = official_array(peak, final, total, warmup)
    steps = (
        range(total) if total <= 1000 else [*range(0, total, 997), warmup - 1, warmup, total - 1]
    )
    for step in steps:
        value = warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=peak, final=final)
        assert value == pytest.approx(expected[step], rel=1e-12, abs=1e-18), step


def test_corners_of_the_base_recipe():
    recipe = {"total_steps": 500_000, "warmup_steps": 6_250, "peak": 1.5e-3, "final": 1e-5}
    assert warmup_cosine(0, **recipe) == 0
    assert warmup_cosine(6_249, **recipe) == 1.5e-3
    assert warmup_cosine(6_250, **recipe) == 1.5e-3
    assert 1e-5 < warmup_cosine(499_999, **recipe) < 1.0001e-5
    assert warmup_cosine(500_000, **recipe) == 1e-5
    assert warmup_cosine(10**9, **recipe) == 1e-5
    values = [warmup_cosine(s, **recipe) for s in range(6_250, 500_000, 1000)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("step", "warmup", "message"),
    [(-1, 0, "negative"), (0, 10, "below total_steps 10"), (0, -1, "at least 0")],
)
def test_impossible_schedules_are_refused(step, warmup, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(step, total_steps=10, warmup_steps=warmup, peak=1, final=0)
