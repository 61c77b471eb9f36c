"""The order of samples: independent of workers, every row once, resumable from a step number."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.sample_order import SampleOrder


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=25))
    num_shards = draw(st.sampled_from([1, 2, 4, 8]))
    batch = num_shards * draw(st.integers(1, 12))
    assume(sum(sizes) >= batch)
    return SampleOrder(
        sizes,
        seed=draw(st.integers(0, 2**64 - 1)),
        global_batch_size=batch,
        num_shards=num_shards,
        window=draw(st.integers(1, 70)),
    )


def epoch_rows(order, epoch):
    return np.concatenate([order.global_batch(epoch, s) for s in range(order.steps_per_epoch)])


@given(orders(), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_row_once_but_for_less_than_a_batch(order, epoch):
    rows = epoch_rows(order, epoch)
    assert rows.dtype == np.int64
    assert len(np.unique(rows)) == len(rows) == order.steps_per_epoch * order.global_batch_size
    assert 0 <= rows.min() <= rows.max() < order.num_rows
    assert order.num_rows - len(rows) == order.num_rows % order.global_batch_size


@given(orders(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_global_batch_does_not_depend_on_the_number_of_workers(order, epoch):
    for step in range(order.steps_per_epoch):
        expected = order.global_batch(epoch, step)
        assert len(expected) == order.global_batch_size
        for num_ranks in (1, 2, 4, 8):
            if order.num_shards % num_ranks == 0:
                parts = [order.rank_batch(epoch, step, r, num_ranks) for r in range(num_ranks)]
                assert {len(part) for part in parts} == {order.global_batch_size // num_ranks}
                np.testing.assert_array_equal(np.concatenate(parts), expected)


@given(orders(), st.data())
@settings(max_examples=100, deadline=None)
def test_resuming_at_any_step_continues_identically(order, data):
    total = 3 * order.steps_per_epoch
    straight = [order.global_batch(*order.locate(step)) for step in range(total)]
    fresh = SampleOrder(
        order._sizes.tolist(),
        seed=order.seed,
        global_batch_size=order.global_batch_size,
        num_shards=order.num_shards,
        window=order.window,
    )
    assert fresh.to_dict() == order.to_dict()
    for step in range(data.draw(st.integers(0, total - 1)), total):
        np.testing.assert_array_equal(fresh.global_batch(*fresh.locate(step)), straight[step])


@given(orders(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_windows_are_what_batches_are_made_of(order, epoch):
    for shard in range(order.num_shards):
        used = [
            order.read_of(epoch, shard, window).row_ids()[start:stop]
            for step in range(order.steps_per_epoch)
            for window, start, stop in order.windows_of(step)
        ]
        reads = [order.read_of(epoch, shard, window) for window in range(order.num_windows)]
        in_order = np.concatenate([read.row_ids() for read in reads])
        np.testing.assert_array_equal(np.concatenate(used), in_order)
        for read in reads:
            assert read.num_rows <= order.window
            assert sum(stop - start for start, stop in read.runs) == read.num_rows
            assert all(0 <= start < stop <= order.num_rows for start, stop in read.runs)


def test_a_window_touches_few_row_groups():
    order = SampleOrder([100] * 1000, seed=0, global_batch_size=256, num_shards=8, window=400)
    for shard in range(8):
        for window in range(order.num_windows):
            read = order.read_of(0, shard, window)
            touched = {row // 100 for start, stop in read.runs for row in (start, stop - 1)}
            assert len(touched) <= 400 // 100 + 3  # two ends, and once the end of the rotation
            assert len(read.runs) <= len(touched) + 1


def test_epochs_and_seeds_differ():
    def first(seed, epoch):
        order = SampleOrder([64] * 16, seed=seed, global_batch_size=32, num_shards=4, window=64)
        return order.global_batch(epoch, 0).tolist()

    batches = [first(seed, epoch) for seed in range(3) for epoch in range(5)]
    assert len({tuple(batch) for batch in batches}) == 15
    order = SampleOrder([64] * 16, seed=0, global_batch_size=32, num_shards=4, window=64)
    overlap = set(epoch_rows(order, 0)[:256]) & set(epoch_rows(order, 1)[:256])
    assert 30 < len(overlap) < 110  # 64 expected of two independent quarters


@pytest.mark.parametrize("sizes", [[1000], [10] * 100, [500, 1, 499]])
def test_the_dropped_remainder_changes(sizes):
    order = SampleOrder(sizes, seed=1, global_batch_size=96, num_shards=8, window=50)
    everything = set(range(1000))
    dropped = [frozenset(everything - set(epoch_rows(order, e).tolist())) for e in range(60)]
    assert len(set(dropped)) >= 55
    assert len(frozenset().union(*dropped)) > 800  # no row is left out for good


def test_the_order_is_mixed():
    """Neighbours in the table are spread over the epoch, although reading is by row group."""
    order = SampleOrder([50] * 400, seed=7, global_batch_size=200, num_shards=8, window=500)
    rows = epoch_rows(order, 0)
    rank_correlation = np.corrcoef(np.arange(len(rows)), rows)[0, 1]
    assert abs(rank_correlation) < 0.12
    groups_in_batch = [len(set((batch // 50).tolist())) for batch in rows.reshape(-1, 200)]
    assert np.median(groups_in_batch) >= 60  # of 8 shards x 10 row groups a window


def test_golden():
    """An order once trained with must not change: checkpoints hold nothing but a step number."""
    order = SampleOrder([5, 9, 0, 7, 3], seed=42, global_batch_size=4, num_shards=2, window=5)
    assert order.to_dict() == {
        "version": 1,
        "seed": 42,
        "global_batch_size": 4,
        "num_shards": 2,
        "window": 5,
        "num_rows": 24,
        "row_groups": "60a71113b5cb3b2492e79534350a72a5",
    }
    # fmt: off
    assert epoch_rows(order, 0).tolist() == [
        2, 3, 7, 9, 4, 15, 10, 8, 14, 20, 11, 13, 16, 18, 22, 21, 17, 19, 23, 12, 5, 6, 0, 1,
    ]
    assert epoch_rows(order, 1).tolist() == [
        13, 16, 4, 5, 17, 15, 23, 22, 14, 19, 21, 7, 18, 1, 6, 8, 0, 20, 10, 9, 3, 2, 12, 11,
    ]
    # fmt: on


def test_a_billion_rows_are_cheap():
    sizes = np.full(1_000_000, 1000)
    tracemalloc.start()
    started = time.perf_counter()
    order = SampleOrder(sizes, seed=3, global_batch_size=4096, num_shards=64)
    order.global_batch(0, 0)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(100, 200):
        order.rank_batch(0, step, 3, 64)
    per_step = (time.perf_counter() - started) / 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.num_rows == 10**9
    assert planned < 10
    assert per_step < 0.05
    assert peak < 150e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 30}, "global_batch_size = 30 is not a multiple of num_shards = 8"),
        ({"global_batch_size": 800}, "global_batch_size = 800 exceeds the 500 rows"),
        ({"global_batch_size": 0}, "global_batch_size = 0"),
        ({"num_shards": 0}, "num_shards = 0"),
        ({"window": 0}, "window = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"row_group_sizes": [5, -1]}, "row_group_sizes"),
    ],
)
def test_misfits_are_refused(arguments, message):
    fitting = {"row_group_sizes": [100] * 5, "seed": 0, "global_batch_size": 32}
    with pytest.raises(InputError, match=message):
        SampleOrder(**{**fitting, **arguments})


def test_wrong_ranks_and_steps_are_refused():
    order = SampleOrder([100] * 5, seed=0, global_batch_size=32)
    with pytest.raises(InputError, match=r"num_workers = 3 does not divide.*one of 1, 2, 4, 8"):
        order.rank_batch(0, 0, 0, 3)
    with pytest.raises(ValueError, match="rank = 2 of 2"):
        order.rank_batch(0, 0, 2, 2)
    with pytest.raises(ValueError, match="step = 15: the epoch has steps 0 to 14"):
        order.global_batch(0, 15)
    with pytest.raises(ValueError, match="no window"):
        order.read_of(0, 8, 0)


def test_orders_that_differ_say_so():
    def order(**changes):
        values = {"seed": 0, "global_batch_size": 32, "window": 64, **changes}
        return SampleOrder([100] * 5, **values).to_dict()

    variants = [order(), order(seed=1), order(window=65), order(num_shards=4)]
    variants.append(SampleOrder([250] * 2, seed=0, global_batch_size=32, window=64).to_dict())
    assert len({tuple(variant.values()) for variant in variants}) == 5
