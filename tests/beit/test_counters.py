"""Streams of random numbers: their values are part of tables, orders and runs that exist."""

import itertools

import numpy as np
import pytest

from beit import counters
from beit.images import image_digest

DIGEST = image_digest(b"\0")
STREAMS = [
    counters.VIEWS,
    counters.MASKS,
    counters.ORDER_GROUPS,
    counters.ORDER_ROTATION,
    counters.ORDER_WINDOWS,
    counters.AUGMENTATIONS,
    counters.ERASURES,
    counters.ERASED_PIXELS,
    counters.MIXES,
]


def test_words_do_not_change_from_release_to_release():
    """Golden: a change here gives every table, order and mask of before another meaning."""
    order = [counters.words(5, stream, (1, 2, 3), 1)[0] for stream in STREAMS[2:5]]
    assert order == [3505761252815942983, 10664135168318060490, 9759596371567998130]
    position = (3, *counters.of_digest(DIGEST))
    assert counters.uniforms(77, counters.VIEWS, position, 5) == [
        0.7690447071140433,
        0.56566444221685,
        0.9414982975157138,
        0.5781623475375216,
        0.06231580646114154,
    ]
    assert counters.device_seed(0, 0, 0) == 71623931719001904
    assert counters.device_seed(5, 100, 3) == 13264197330882826


def test_no_two_streams_share_words():
    """Whatever the seed and the position, and for any step that a run can reach."""
    drawn = [set(counters.words(0, stream, (0, 0, 0), 100).tolist()) for stream in STREAMS]
    steps = [counters.step_generator(0, step).bit_generator for step in (0, 1, 10**9)]
    drawn += [set(step.random_raw(100).tolist()) for step in steps]
    assert all(not left & right for left, right in itertools.combinations(drawn, 2))
    assert min(STREAMS) > 2**48


@pytest.mark.parametrize("seed", [0, 2**63 + 1, 2**64 - 1])
def test_words_are_those_of_numpys_philox(seed):
    key, counter = np.zeros(2, np.uint64), np.zeros(4, np.uint64)
    key[0], key[1], counter[1:] = seed, counters.MASKS, (4, 5, 6)
    expected = np.random.Philox(key=key, counter=counter)
    generator = counters.generator(seed, counters.MASKS, (4, 5, 6))
    np.testing.assert_array_equal(generator.bit_generator.random_raw(9), expected.random_raw(9))
    with pytest.raises(OverflowError):
        counters.words(-1, counters.MASKS, (0, 0, 0), 1)


def test_large_seeds_differ():
    """Seeds of 64 bits count in full: none is rounded to a neighbour."""
    first = {counters.step_generator(seed, 3).random() for seed in range(2**64 - 50, 2**64)}
    assert len(first) == 50
