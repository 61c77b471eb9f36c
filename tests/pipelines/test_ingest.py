"""Batches follow the sample order exactly, carry the right tokens, whoever does the work."""

import contextlib
import dataclasses
import os
import pickle
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from beit import views
from beit.images import decode_array, image_digest
from beit.masking import mask_of
from beit.views import ViewPolicy, render, render_fast, sample_view
from pipelines.config.pretrain import MaskingConfig
from pipelines.errors import InputError
from pipelines.reading import decoding
from pipelines.reading.encoded_rows import open_training_tables
from pipelines.reading.ingest import train_batches
from pipelines.sample_order import SampleOrder
from pipelines.tables.image_table import ImageTable
from tests.pipelines.ingest_fixtures import (
    GRID,
    NUM_ROWS,
    POLICY,
    encoded,
    levels_of,
    tokens_of,
    write_images,
    write_tokens,
)

MASKING = MaskingConfig(num_masked=6, min_block=2)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    images = write_images(str(root / "images"))
    assert len(images.row_groups) > 10
    return {
        "root": root,
        "images": images.uri,
        "tokens": write_tokens(str(root / "tokens"), images, range(2)),
        "more": write_tokens(str(root / "more"), images, range(2, 3)),
        "apart": write_tokens(str(root / "apart"), images, range(7, 9)),
    }


@pytest.fixture(scope="module")
def data(tables):
    return open_training_tables(tables["images"], [tables["tokens"], tables["more"]])


def make_order(data, **changes):
    values = {"seed": 5, "global_batch_size": 16, "num_shards": 4, "window": 9, **changes}
    return SampleOrder(data.row_group_sizes, **values)


def stream(data, order=None, **changes):
    values = {"image_size": 32, "seed": 3, "masking": MASKING, "start_step": 0, "stop_step": 12}
    values |= changes
    return train_batches(data, order or make_order(data), **values)


def assert_same(left, right):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.fixture(scope="module")
def reference(data):
    with stream(data) as batches:
        return list(batches)


def test_batches_are_what_the_pure_functions_say(data, reference):
    order = make_order(data)
    assert [batch.step for batch in reference] == list(range(12))
    assert order.steps_per_epoch == 7
    for batch in reference:
        epoch, step = order.locate(batch.step)
        assert batch.epoch == epoch
        rows = order.global_batch(epoch, step)
        np.testing.assert_array_equal(batch.row_ids, rows)
        assert batch.pixels.shape == (16, 3, 32, 32)
        assert batch.pixels.dtype == torch.uint8
        assert batch.mask.shape == batch.token_ids.shape == (16, 16)
        assert (batch.mask.dtype, batch.token_ids.dtype) == (torch.bool, torch.int64)
        for i, row in enumerate(rows):
            digest, source = image_digest(encoded(row)), decode_array(encoded(row))
            view = (epoch + int.from_bytes(digest[:8], "little")) % 3
            assert batch.views[i] == view
            np.testing.assert_array_equal(batch.token_ids[i], tokens_of([row], [view])[0, 0])
            drawn = sample_view(POLICY, digest, view, *source.shape[:2])
            expected = render_fast(source, drawn, 32).transpose(2, 0, 1)
            np.testing.assert_array_equal(batch.pixels[i], expected)
            mask = mask_of(digest, epoch, seed=3, grid_size=GRID, num_masked=6, min_block=2)
            np.testing.assert_array_equal(batch.mask[i], mask)
            assert 1 <= mask.sum() <= 6


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_the_global_batch(data, reference, num_ranks):
    streams = [stream(data, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for whole, *parts in zip(reference, *streams, strict=True):
        for name in ("row_ids", "views", "pixels", "mask", "token_ids"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name


@pytest.mark.parametrize("start", [1, 5, 6, 7, 11])
def test_resuming_continues_identically(data, reference, start):
    with stream(data, start_step=start) as batches:
        for batch, expected in zip(batches, reference[start:], strict=True):
            assert_same(batch, expected)


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (4, 1), (3, 5)])
def test_threads_and_prefetch_change_nothing(data, reference, num_threads, prefetch):
    with stream(data, num_threads=num_threads, prefetch_batches=prefetch) as batches:
        for batch, expected in zip(batches, reference, strict=True):
            assert_same(batch, expected)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows_of_any_size(data, window):
    order = make_order(data, window=window)
    with stream(data, order) as batches:
        for batch in batches:
            np.testing.assert_array_equal(
                batch.row_ids, order.global_batch(*order.locate(batch.step))
            )


@pytest.mark.ray
def test_ray_tasks_give_the_same_batches(ray_cluster, data, reference, monkeypatch):
    monkeypatch.setattr(decoding.RayDecoder, "slice_rows", 5)
    with stream(data, executor="ray_tasks") as batches:
        for batch, expected in zip(batches, reference, strict=True):
            assert_same(batch, expected)
    with stream(data, executor="ray_tasks", rank=1, num_ranks=2, start_step=9) as batches:
        assert torch.equal(next(batches).pixels, reference[9].pixels[8:])


@pytest.mark.ray
def test_killed_ray_workers_change_nothing(ray_cluster, data, reference, monkeypatch):
    monkeypatch.setattr(decoding.RayDecoder, "slice_rows", 2)
    killed = 0
    for _ in range(10):  # whether a task runs where we look is chance
        with stream(data, executor="ray_tasks", prefetch_batches=3) as batches:
            for batch, expected in zip(batches, reference, strict=True):
                assert_same(batch, expected)
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error, ProcessLookupError):
                        if killed < 3 and "ray::render_rows" in " ".join(process.cmdline()):
                            os.kill(process.pid, signal.SIGKILL)
                            killed += 1
        if killed == 3:
            break
    assert killed == 3


@pytest.mark.ray
def test_ray_tasks_report_damage(ray_cluster, tmp_path):
    write_images(str(tmp_path), change=50)
    data = open_training_tables(str(tmp_path), policy=POLICY)
    with (
        pytest.raises(InputError, match=r"folder/00050.jpg.*does not decode \(truncated"),
        stream(data, grid_size=GRID, executor="ray_tasks") as batches,
    ):
        list(batches)


def test_the_exact_path_and_the_tokenizers_view(data, reference):
    with stream(data, fast=False, token_view=(16, "lanczos"), stop_step=2) as batches:
        for batch, fast in zip(batches, reference, strict=False):
            assert (batch.pixels.float() - fast.pixels.float()).abs().mean() < 0.1
            for i, row in enumerate(batch.row_ids.tolist()):
                source = decode_array(encoded(row))
                view = sample_view(
                    POLICY, image_digest(encoded(row)), int(batch.views[i]), *source.shape[:2]
                )
                for pixels, size, kind in (
                    (batch.pixels, 32, "bicubic"),
                    (batch.token_pixels, 16, "lanczos"),
                ):
                    expected = render(source, view, size, kind).transpose(2, 0, 1)
                    np.testing.assert_array_equal(pixels[i], expected)


def test_without_tokens_every_epoch_draws_a_view_of_its_own(tables):
    data = open_training_tables(tables["images"], policy=POLICY)
    with stream(data, grid_size=GRID, masking=None) as batches:
        for batch in batches:
            assert batch.token_ids is None
            assert set(batch.views.tolist()) == {batch.epoch}
            assert not batch.mask.any()
    with pytest.raises(InputError, match="no view policy"):
        open_training_tables(tables["images"])
    with pytest.raises(InputError, match="grid_size"):
        stream(data)


@pytest.fixture(scope="module")
def levelled(tables):
    """The same tokens with grey levels; views 0 and 1 only, so that view 2 has none."""
    uri = str(tables["root"] / "levelled")
    levelled = write_tokens(uri, ImageTable.open(tables["images"]), range(2), levels=True)
    return open_training_tables(tables["images"], [levelled, tables["more"]])


def test_grey_levels_leave_exact_views_as_they_are(data, levelled, monkeypatch):
    with stream(data, fast=False) as without, stream(levelled, fast=False) as with_levels:
        for batch, expected in zip(with_levels, without, strict=True):
            assert_same(batch, expected)
    full = open_training_tables(levelled.images.uri, [levelled.tokens[0].uri])
    rows = full.read(0, NUM_ROWS, 0)
    expected = levels_of(range(NUM_ROWS), range(2))[np.arange(NUM_ROWS), rows.views]
    np.testing.assert_array_equal(rows.grey_levels, expected)
    # And with them no full image is looked at.
    monkeypatch.setattr(views, "mean_grey", None)
    monkeypatch.setattr(views, "fast_mean_grey", None)
    for fast in (False, True):
        with stream(full, fast=fast) as batches:
            assert len(list(batches)) == 12


def test_view_ranges_may_lie_apart(tables):
    data = open_training_tables(tables["images"], [tables["apart"], tables["tokens"]])
    assert data.views.tolist() == [0, 1, 7, 8]
    with stream(data) as batches:
        for batch in batches:
            rows, views = batch.row_ids.numpy(), batch.views.numpy()
            expected = np.stack(
                [tokens_of([r], [v])[0, 0] for r, v in zip(rows, views, strict=True)]
            )
            np.testing.assert_array_equal(batch.token_ids, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_fingerprint": "b" * 32}, "image_fingerprint: 'b"),
        ({"grid_size": (2, 8)}, r"grid_size: \[2, 8\] != \[4, 4\]"),
        ({"vocab_size": 30000}, "vocab_size: 30000 != 20000"),
        ({"tokenizer_fingerprint": "c" * 32}, "tokenizer_fingerprint: 'c"),
        ({"policy": ViewPolicy(seed=12).to_dict()}, "policy.seed: 12 != 11"),
    ],
)
def test_foreign_tables_are_refused_by_field(tables, tmp_path, changes, message):
    images = ImageTable.open(tables["images"])
    uri = write_tokens(str(tmp_path), images, range(3, 4), **changes)
    wanted = {
        "grid_size": GRID, "vocab_size": 20000, "tokenizer_fingerprint": "a" * 32, "policy": POLICY,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        open_training_tables(tables["images"], [uri], **wanted)
    if "image_fingerprint" not in changes:
        with pytest.raises(InputError, match=message.split(":")[0]):
            open_training_tables(tables["images"], [tables["tokens"], uri])


def test_tables_with_a_view_in_common_are_refused(tables, tmp_path):
    uri = write_tokens(str(tmp_path), ImageTable.open(tables["images"]), range(1, 3))
    with pytest.raises(InputError, match="view 1 is in both"):
        open_training_tables(tables["images"], [tables["tokens"], uri])


def test_every_key_is_checked(tables, tmp_path):
    uri = write_tokens(str(tmp_path), ImageTable.open(tables["images"]), range(2), rename=71)
    data = open_training_tables(tables["images"], [uri])
    with (
        pytest.raises(InputError, match="key of row 71 is 'intruder', but 'folder/00071"),
        stream(data) as batches,
    ):
        list(batches)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    write_images(str(tmp_path), change=50)
    data = open_training_tables(str(tmp_path), policy=POLICY)
    before = threading.active_count()
    with pytest.raises(InputError, match=r"folder/00050.jpg.*does not decode \(truncated"):
        list(stream(data, grid_size=GRID))
    assert threading.active_count() == before


def test_sizes_that_do_not_fit_are_refused(data):
    for changes, message in (
        ({"masking": MaskingConfig(num_masked=17, min_block=2)}, "masking.num_masked = 17"),
        ({"num_ranks": 3}, "num_workers = 3"),
        ({"prefetch_batches": 0}, "prefetch_batches = 0"),
        ({"num_threads": 0}, "num_threads = 0"),
        ({"executor": "magic"}, "executor = 'magic'"),
        ({"grid_size": (2, 2)}, "grid_size"),
        ({"order": SampleOrder([50], seed=0, global_batch_size=8)}, "the order is of 50 rows"),
    ):
        before = threading.active_count()
        with pytest.raises(InputError, match=message):
            stream(data, **changes)
        assert threading.active_count() == before


def test_closing_stops_all_threads(data):
    before = threading.active_count()
    batches = stream(data, stop_step=10**9)
    assert next(batches).step == 0
    assert threading.active_count() > before
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert list(batches) == []


def test_reading_ahead_is_bounded(data):
    """However far training lies behind, windows * shards rows are held, and a window more."""
    order = make_order(data, window=5, global_batch_size=4)
    batches = stream(data, order, stop_step=10**9, prefetch_batches=2)
    next(batches)
    previous = -1
    while batches.counters.rows_read != previous:  # until the read-ahead has come to rest
        previous = batches.counters.rows_read
        time.sleep(0.2)
    # 4 shards: held (4 + 1) * 5 at most when a window is added, 3 batches of 4 given out.
    assert 20 <= previous <= (4 + 1) * 5 + 5 + 3 * 4
    batches.close()


def test_counters(data, reference):
    with stream(data, stop_step=7) as batches:
        list(batches)
        counters = batches.counters
    assert counters.rows_decoded == 7 * 16
    assert counters.rows_read == 7 * 16
    assert counters.bytes_read == sum(
        len(encoded(row)) for batch in reference[:7] for row in batch.row_ids.tolist()
    )
    assert counters.read_seconds > 0
    assert counters.decode_seconds > 0


def test_specs_travel_to_other_processes(data):
    spec = decoding.RenderSpec(
        policy=POLICY, image_size=32, masking=MASKING, grid_size=GRID, seed=0
    )
    assert pickle.loads(pickle.dumps(spec)) == spec
