"""Augmentation and mixing: drawn from their arguments alone, and as often as they should be."""

import numpy as np
import pytest
import torch

from beit.augment import OPERATIONS, Augmentation, apply_operations, augmentation_of, erasure_of
from beit.images import image_digest
from beit.mixing import Mix, mix_of, mixed

DIGESTS = [image_digest(bytes([i % 256, i // 256])) for i in range(2000)]
MIXING = {"seed": 0, "size": (32, 48), "mixup": 0.8, "cutmix": 1.0}


@pytest.fixture(scope="module")
def drawn():
    return [augmentation_of(digest, 3, seed=0, size=64) for digest in DIGESTS]


def test_an_augmentation_is_a_function_of_seed_digest_and_epoch(drawn):
    again = [augmentation_of(digest, 3, seed=0, size=64) for digest in reversed(DIGESTS)]
    assert again[::-1] == drawn
    other = [augmentation_of(digest, 4, seed=0, size=64) for digest in DIGESTS]
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 0.35 * len(drawn)
    assert augmentation_of(DIGESTS[0], 0, seed=1, size=64) != augmentation_of(
        DIGESTS[0], 1, seed=1, size=64
    )


def test_golden():
    """A change here is a change of every run that goes on."""
    found = augmentation_of(DIGESTS[7], 5, seed=11, size=224)
    operations = (("solarize", -0.9219395412822354), ("shear_x", 0.9455139893349902))
    assert found == Augmentation(operations=operations, erased=None)


def test_operations_are_picked_evenly_and_applied_half_of_the_time(drawn):
    names = [name for each in drawn for name, _ in each.operations]
    assert len(names) == pytest.approx(len(drawn), rel=0.05)
    for name in OPERATIONS:
        assert names.count(name) == pytest.approx(len(names) / 15, rel=0.35), name
    strengths = np.array([strength for each in drawn for _, strength in each.operations])
    assert np.abs(strengths).mean() == pytest.approx(0.9, abs=0.01)
    assert np.abs(strengths).std() == pytest.approx(0.05, abs=0.01)
    assert np.abs(strengths).max() <= 1
    assert (strengths < 0).mean() == pytest.approx(0.5, abs=0.05)


def test_a_quarter_of_views_is_erased_within_bounds(drawn):
    boxes = [each.erased for each in drawn if each.erased]
    assert len(boxes) / len(drawn) == pytest.approx(0.25, abs=0.03)
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 64
        assert 0 <= left <= left + width <= 64
    areas = [height * width / 64**2 for _, _, height, width in boxes]
    assert min(areas) == pytest.approx(0.02, abs=0.01)
    assert max(areas) <= 0.35
    assert np.mean(areas) > 0.12


def test_knobs_change_their_own_thing_only(drawn):
    calm = [augmentation_of(d, 3, seed=0, size=64, erase_probability=0.0) for d in DIGESTS]
    assert [each.operations for each in calm] == [each.operations for each in drawn]
    assert not any(each.erased for each in calm)
    bare = [augmentation_of(d, 3, seed=0, size=64, num_operations=0) for d in DIGESTS]
    assert [each.erased for each in bare] == [each.erased for each in drawn]
    fixed = [augmentation_of(d, 3, seed=0, size=64, magnitude_std=0.0) for d in DIGESTS]
    assert {abs(s) for each in fixed for _, s in each.operations} == {0.9}


def test_every_operation_at_full_strength_gives_a_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in OPERATIONS:
        for strength in (-1.0, 0.0, 1.0):
            found = apply_operations(pixels, [(name, strength)], (1, 2, 3))
            assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8), name


def test_noise_is_standard_normal_and_repeats():
    first = erasure_of(DIGESTS[0], 2, (3, 4, 40, 30), seed=0)
    assert (first.top, first.left, first.noise.shape) == (3, 4, (3, 40, 30))
    assert first.noise.mean() == pytest.approx(0, abs=0.06)
    assert first.noise.std() == pytest.approx(1, abs=0.04)
    again = erasure_of(DIGESTS[0], 2, (3, 4, 40, 30), seed=0)
    np.testing.assert_array_equal(again.noise, first.noise)
    assert (erasure_of(DIGESTS[1], 2, (3, 4, 40, 30), seed=0).noise != first.noise).any()


def test_a_mix_is_a_function_of_seed_step_and_shard():
    mixes = [mix_of(step=step, shard=shard, **MIXING) for step in range(300) for shard in (0, 1)]
    assert mix_of(step=7, shard=1, **MIXING) == mixes[15]
    assert len(set(mixes)) > 580, "CutMix now and then leaves all as it is"
    pasted = [mix for mix in mixes if mix.box]
    assert len(pasted) / len(mixes) == pytest.approx(0.5, abs=0.06)
    for mix in pasted:
        top, left, bottom, right = mix.box
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / (32 * 48))
    shares = [mix.share for mix in mixes if not mix.box]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.2)  # of a beta(a, a)


def test_mixing_can_be_off_or_rare():
    calm = [mix_of(step=s, shard=0, **{**MIXING, "mixup": 0, "cutmix": 0}) for s in range(5)]
    assert calm == [None] * 5
    rare = [mix_of(step=s, shard=0, **MIXING, probability=0.2) for s in range(300)]
    assert sum(mix is not None for mix in rare) == pytest.approx(60, abs=25)
    for kind, has_box in (("mixup", True), ("cutmix", False)):
        only = [mix_of(step=s, shard=0, **{**MIXING, kind: 0}) for s in range(20)]
        assert all((mix.box is not None) == has_box for mix in only)


def test_images_meet_the_one_at_the_mirrored_place():
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 4, 6)
    blended = mixed(pixels, Mix(share=0.75))
    torch.testing.assert_close(blended[0], torch.full((3, 4, 6), 0.75))
    torch.testing.assert_close(blended[2], torch.full((3, 4, 6), 0.75 * 2 + 0.25))
    cut = mixed(pixels, Mix(share=0.75, box=(1, 2, 3, 5)))
    assert (cut[0, :, 1:3, 2:5] == 3).all()
    assert cut[0].sum() == 3 * 3 * 6
