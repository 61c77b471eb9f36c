import math
from pathlib import Path

import pytest

from pipelines import plan
from pipelines.config.plan import PlanConfig
from pipelines.errors import InputError
from tests.chaos import world


def test_the_arithmetic_of_a_stated_plan():
    result = plan.run(
        PlanConfig(
            num_images=1_281_167,
            num_views=4,
            epochs=300,
            num_gpus=8,
            num_cpus=200,
            encode_rate=2000,
            decode_rate=100,
            train_rate=1000,
        )
    )
    # 1,281,167 * 4 views at 8 * 2000 a second.
    assert result.tokenize_hours == pytest.approx(1_281_167 * 4 / 16_000 / 3600)
    assert result.tokenize_gpu_hours == pytest.approx(1_281_167 * 4 / 2000 / 3600)
    assert result.limited_by == "encoding"
    assert result.token_bytes == 1_281_167 * 4 * 392
    assert result.num_units == math.ceil(1_281_167 / 1024)
    assert result.online_gpu_hours == pytest.approx(300 * 1_281_167 / 2000 / 3600)
    # Computing V views once costs what V epochs online cost.
    assert result.break_even_epochs == 5
    text = result.summary()
    assert "2.0 GB of tokens" in text
    assert "caching pays from 5 epochs" in text
    assert "2,000 views/s a GPU: stated, not measured" in text


def test_ways_to_pixels_are_compared():
    """8 GPUs of 1,000 images/s; a core decodes in 2.45 ms, and renders 4 views in 18."""
    result = plan.run(PlanConfig(num_images=10**6, num_views=4, num_gpus=8, num_cpus=100))
    images, lossless, *jpegs = result.pixels
    assert images.cores == 20
    assert images.num_bytes == 110 * 10**9
    assert 3 * lossless.cores < images.cores
    assert lossless.num_bytes == 392 * 10**9
    assert [form.num_bytes for form in jpegs] == [96 * 10**9, 52 * 10**9]
    assert result.render_hours == pytest.approx(10**6 * 18e-3 / 100 / 3600)
    # 18 ms are what so many epochs of saving a step's decoding give back.
    saved = 1000 / images.images_per_second - 1000 / lossless.images_per_second
    assert (
        (result.render_break_even_epochs - 1) * saved
        <= 18
        < result.render_break_even_epochs * saved
    )
    assert "lossless views: " in result.summary()
    # 180 s of 100 cores, and 0.6 of that where tokenize has the pixels in its hands anyway.
    assert "in 3.0 minutes on all cores, or in 1.8 minutes by tokenize" in result.summary()


def test_slow_decoding_limits_and_moves_the_break_even():
    common = {"num_images": 10**6, "num_gpus": 8, "encode_rate": 2000, "decode_rate": 10}
    few = plan.run(PlanConfig(num_cpus=100, **common))
    many = plan.run(PlanConfig(num_cpus=10_000, **common))
    assert (few.limited_by, many.limited_by) == ("decoding", "encoding")
    assert few.tokenize_hours == pytest.approx(10**6 / 1000 / 3600)
    assert few.break_even_epochs > many.break_even_epochs == 5


def test_fewer_views_take_less_decoding():
    one, four = (
        plan.run(PlanConfig(num_images=10**6, num_views=views, num_cpus=1)) for views in (1, 4)
    )
    assert one.limited_by == four.limited_by == "decoding"
    assert four.tokenize_hours / one.tokenize_hours == pytest.approx(3)


def test_counts_come_from_the_manifest_and_nothing_is_touched(tmp_path):
    images = world.make_images(str(tmp_path / "images"), count=100, parts=3)
    world.make_tokenizer(str(tmp_path / "tokenizer"))
    before = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")}
    config = PlanConfig(
        images=images, tokenizer=str(tmp_path / "tokenizer"), num_images=7, rows_per_unit=20
    )
    result = plan.run(config)
    assert result.num_images == 100
    # Parts of 33, 33 and 34 rows: two units each.
    assert result.num_units == 6
    assert result.image_bytes == sum(
        path.stat().st_size for path in (tmp_path / "images").glob("part-*.parquet")
    )
    assert result.encode_rate > 0
    assert result.device == "machine"
    assert "machine-hours" in result.summary()
    assert "GPU" not in result.summary()
    assert result.token_bytes == 100 * 4 * 16 * 2  # the tokenizer's grid is 4 x 4
    assert any("measured here" in line for line in result.assumptions)
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")} == before


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="num_images"):
        PlanConfig()
    with pytest.raises(InputError, match="encode_rate"):
        PlanConfig(num_images=5, encode_rate=0)
    with pytest.raises(InputError, match="beit prepare"):
        plan.run(PlanConfig(images=str(tmp_path / "none")))
