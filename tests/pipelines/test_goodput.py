import pytest
import torch

from pipelines.training.goodput import (
    CATEGORIES,
    Attempt,
    Books,
    account,
    bottleneck,
    device_peak,
    known_peak,
    model_flops_utilisation,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def attempt(number, launched, entered, steps, **seconds):
    return Attempt(
        number=number,
        launched_at=launched,
        entered_at=entered,
        start_step=steps[0],
        next_step=steps[1],
        workers=2,
        seconds=seconds,
    )


def test_every_second_is_booked_once():
    clock = Clock()
    books = Books(clock)
    clock.now = 3.0
    books.switch("compute")
    for _ in range(4):
        with books.spend("data_wait"):
            clock.now += 0.5
        clock.now += 1.0
        with books.spend("checkpoint"):
            clock.now += 0.25
            with books.spend("evaluation"):
                clock.now += 0.5
            clock.now += 0.25
    seconds = books.seconds()
    assert seconds["startup"] == 3.0
    assert (seconds["data_wait"], seconds["compute"]) == (2.0, 4.0)
    assert (seconds["checkpoint"], seconds["evaluation"]) == (2.0, 2.0)
    assert sum(seconds.values()) == clock.now
    assert set(seconds) == set(CATEGORIES)


def test_books_are_closed_when_the_work_inside_fails():
    clock = Clock()
    books = Books(clock)
    with pytest.raises(RuntimeError), books.spend("checkpoint"):
        clock.now = 2.0
        raise RuntimeError
    clock.now = 3.0
    assert books.seconds() == dict.fromkeys(CATEGORIES, 0.0) | {"checkpoint": 2.0, "startup": 1.0}


def test_a_run_with_a_restart_and_an_absence_adds_up():
    attempts = [
        # Launched at 100, entered at 110, ran to 150 doing 20 steps; killed.
        attempt(1, 100.0, 110.0, (0, 20), startup=5.0, compute=30.0, data_wait=5.0),
        # The same driver restarted it: entered at 160, from step 15.
        attempt(2, 100.0, 160.0, (15, 30), startup=2.0, compute=28.0),
        # Driver killed at 190; somebody starts it again at 300.
        attempt(3, 300.0, 312.0, (30, 40), startup=3.0, compute=20.0, checkpoint=5.0),
    ]
    result = account(attempts, end=345.0)
    seconds = result.seconds
    assert seconds["startup"] == 15.0
    assert seconds["idle"] == 110.0 + 5.0
    # Gap 150-160, start-up of the second and third, and the 5 of 20 steps that were done again.
    assert seconds["restart"] == pytest.approx(10 + 2 + 12 + 3 + 30 * 5 / 20)
    assert seconds["compute"] == pytest.approx(30 * 15 / 20 + 28 + 20)
    assert result.wall_seconds == pytest.approx(245.0)
    assert sum(seconds.values()) == pytest.approx(result.wall_seconds)
    assert result.repeated_steps == 5
    assert result.bottleneck == "restart", "nobody ran while it was idle: nothing to look at"
    assert result.share == pytest.approx(seconds["compute"] / 245.0)


def test_a_run_without_any_attempt_is_idle():
    assert account([], end=5.0).wall_seconds == 0.0


@pytest.mark.parametrize("name", ["data_wait", "checkpoint", "evaluation", "restart", "startup"])
def test_the_bottleneck_is_the_largest_loss(name):
    seconds = dict.fromkeys(CATEGORIES, 1.0) | {"compute": 70.0, name: 20.0}
    assert bottleneck(seconds) == name


def test_nothing_large_beside_compute_means_compute():
    assert bottleneck(dict.fromkeys(CATEGORIES, 0.5) | {"compute": 100.0}) == "compute"


def test_mfu_is_the_stated_formula():
    assert model_flops_utilisation(1000.0, 100e9, 2, 100.0) == {"mfu": pytest.approx(0.5)}


def test_mfu_is_none_where_the_peak_is_not_known():
    cpu = torch.device("cpu")
    assert device_peak(cpu) is None
    assert device_peak(cpu, 0.05) == 0.05
    assert model_flops_utilisation(1000.0, 100e9, 2, device_peak(cpu)) == {}


def test_peaks_are_found_by_the_name_that_torch_gives():
    assert known_peak("NVIDIA H200") == 989.0
    assert known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert known_peak("Some New GPU") is None
