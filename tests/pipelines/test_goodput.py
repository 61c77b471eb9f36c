import pytest

from pipelines.training.goodput import (
    CATEGORIES,
    Attempt,
    Books,
    account,
    bottleneck,
    flops_per_image,
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
    assert result.bottleneck == "idle"
    assert result.share == pytest.approx(seconds["compute"] / 245.0)


def test_a_run_without_any_attempt_is_idle():
    assert account([], end=5.0).wall_seconds == 0.0


@pytest.mark.parametrize("name", ["data_wait", "checkpoint", "evaluation", "restart", "startup"])
def test_the_bottleneck_is_the_largest_loss(name):
    seconds = dict.fromkeys(CATEGORIES, 1.0) | {"compute": 70.0, name: 20.0}
    assert bottleneck(seconds) == name


def test_nothing_large_beside_compute_means_compute():
    assert bottleneck(dict.fromkeys(CATEGORIES, 0.5) | {"compute": 100.0}) == "compute"


@pytest.mark.parametrize(
    ("dim", "depth", "expected"), [(768, 12, 107.978305536e9), (1024, 24, 372.788723712e9)]
)
def test_flops_are_those_counted_on_the_real_networks(dim, depth, expected):
    # Counted by torch's FlopCounterMode on instantiated BEiT-Base and -Large.
    flops = flops_per_image(
        dim=dim,
        depth=depth,
        mlp_ratio=4,
        num_patches=196,
        patch_size=16,
        vocab_size=8192,
        num_masked=75,
        whole_last_block=True,
    )
    assert flops == pytest.approx(expected, rel=1e-9)


def test_flops_match_what_our_network_executes():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from beit.mim import BeitMIM

    model = BeitMIM(
        image_size=32,
        patch_size=8,
        dim=64,
        depth=3,
        num_heads=4,
        vocab_size=100,
        absolute_positions=True,
        relative_positions="none",
        layer_scale_init=None,
    )
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :6] = True
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 32, 32), mask, num_masked=12).sum().backward()
    flops = flops_per_image(
        dim=64,
        depth=3,
        mlp_ratio=4,
        num_patches=16,
        patch_size=8,
        vocab_size=100,
        num_masked=6,
    )
    # The counter does not know the fused attention kernel of the CPU: 4 * T^2 * dim a block.
    attention = 3 * 3 * 4 * 17**2 * 64
    assert counter.get_total_flops() / 2 == flops - attention


def test_mfu_is_the_stated_formula():
    assert model_flops_utilisation(1000.0, 100e9, 2, 100.0) == pytest.approx(0.5)


def test_peaks_are_found_by_the_name_that_torch_gives():
    assert known_peak("NVIDIA H200") == 989.0
    assert known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert known_peak("Some New GPU") is None
