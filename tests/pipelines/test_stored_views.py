"""Training from stored views: lossless ones give the batches, losses and weights of exact ones."""

import dataclasses
import functools
import shutil

import pytest
import torch

from pipelines import pretrain
from pipelines.config.pretrain import CROPS
from pipelines.errors import InputError
from pipelines.reading import ingest
from pipelines.reading.encoded_rows import open_training_tables
from pipelines.tables.image_table import ImageTable
from pipelines.training.run_dir import RunDir
from tests.faulty_proxy import faulty_proxy
from tests.pipelines import ingest_fixtures, pretrain_fixtures
from tests.pipelines.pretrain_fixtures import Killed, dies_after, per_step, small_config
from tests.pipelines.pretrain_fixtures import weight_bytes as weights_of
from tests.pipelines.test_ingest import assert_same, make_order, stream
from tests.pipelines.test_resume import TRAIN_LOOP, run_until
from tests.pipelines.view_fixtures import write_views
from tests.s3_server import bucket, s3  # noqa: F401 - fixtures

POLICY = ingest_fixtures.POLICY


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images with tokens of views 0 to 3, and stored views of them in several shapes."""
    root = tmp_path_factory.mktemp("stored")
    images = ingest_fixtures.write_images(str(root / "images"))
    ingest_fixtures.write_tokens(str(root / "tokens"), images, range(4))
    write_views(images, root / "all", num_views=4, policy=POLICY)
    for first in (0, 2):
        write_views(images, root / f"from{first}", first_view=first, policy=POLICY)
    write_views(images, root / "jpegs", num_views=4, policy=POLICY, form="jpeg95")
    return root


def opened(root, *views, images=True):
    return open_training_tables(
        str(root / "images") if images else "",
        [str(root / "tokens")],
        view_uris=[str(root / name) for name in views],
        image_size=32,
    )


@pytest.fixture(scope="module")
def exact(root):
    with stream(opened(root), fast=False) as batches:
        return list(batches)


@pytest.mark.parametrize("views", [["all"], ["from2", "from0"]])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_exact_ones(root, exact, views, threads):
    with stream(opened(root, *views), num_threads=threads) as batches:
        found = list(batches)
    assert len(found) == len(exact) == 12
    assert {batch.epoch for batch in found} == {0, 1}
    for left, right in zip(found, exact, strict=True):
        assert_same(left, right)


def test_any_epoch_rank_and_start_is_the_same(root):
    """The fifth epoch begins the slots again; each rank takes its share."""
    step = 5 * make_order(opened(root)).steps_per_epoch
    for rank in (0, 1):
        of_rank = {"rank": rank, "num_ranks": 2, "start_step": step, "stop_step": step + 3}
        with (
            stream(opened(root, "all"), **of_rank) as found,
            stream(opened(root), fast=False, **of_rank) as wanted,
        ):
            for left, right in zip(found, wanted, strict=True):
                assert_same(left, right)


def test_images_need_not_be_there(root, exact, tmp_path):
    shutil.copytree(root / "all", tmp_path / "all")
    shutil.copytree(root / "tokens", tmp_path / "tokens")
    data = opened(tmp_path, "all", images=False)
    assert data.fingerprints()["images"] == opened(root).fingerprints()["images"]
    with stream(data) as batches:
        for left, right in zip(batches, exact, strict=True):
            assert_same(left, right)


def test_jpegs_are_near(root, exact):
    with stream(opened(root, "jpegs")) as batches:
        for left, right in zip(batches, exact, strict=True):
            off = (left.pixels.int() - right.pixels.int()).abs().float().mean()
            assert 0 < off < 1.5
            assert torch.equal(left.mask, right.mask)


def test_tokens_are_never_made_of_stored_pixels(root):
    with pytest.raises(InputError, match="stored views"):
        stream(opened(root, "all"), token_view=(16, "lanczos"))


def test_what_does_not_fit_is_refused_by_name(root, tmp_path):
    with pytest.raises(InputError, match=r"views \[0, 1\], but trained on are \[0, 1, 2, 3\]"):
        opened(root, "from0")
    with pytest.raises(InputError, match="have 4 and 2 views"):
        opened(root, "all", "from0")
    other = write_views(ImageTable.open(str(root / "images")), tmp_path / "other", num_views=4)
    with pytest.raises(InputError, match=r"policy\.seed"):
        opened(root, other)


def test_batches_are_the_same_from_a_store_whose_network_fails(root, exact, s3, bucket):  # noqa: F811
    uri = s3.uri(bucket, "views")
    write_views(ImageTable.open(str(root / "images")), uri, num_views=4, policy=POLICY)
    with faulty_proxy(s3.port, rate=0.2, seed=3, delay=0.1) as proxy:
        data = open_training_tables(
            "",
            [str(root / "tokens")],
            view_uris=[s3.uri(bucket, "views", port=proxy.port)],
            image_size=32,
        )
        with stream(data) as batches:
            for left, right in zip(batches, exact, strict=True):
                assert_same(left, right)
    assert proxy.counts["truncated"] > 0


# Pretraining


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tables, and a run on exact views, as stored ones should repeat it."""
    root = tmp_path_factory.mktemp("trained")
    tables = pretrain_fixtures.make_tables(root, num_images=48)
    images = ImageTable.open(tables[0])
    write_views(images, root / "views", policy=pretrain_fixtures.POLICY)
    with pytest.MonkeyPatch.context() as patch:
        exact = functools.partial(ingest.train_batches, fast=False)
        patch.setattr(ingest, "train_batches", exact)
        pretrain.run(small_config(tables, root / "exact"))
    return root, tables


def from_views(trained, output, **changes):
    root, tables = trained
    return small_config(tables, output, views=[str(root / "views")], **changes)


def test_a_run_is_that_on_exact_views_though_it_was_killed(trained, tmp_path, monkeypatch):
    root, _ = trained
    config = from_views(trained, tmp_path / "run", images="")
    monkeypatch.setattr(ingest, "train_batches", dies_after(6))
    with pytest.raises(Killed):
        pretrain.run(config)
    monkeypatch.undo()
    with pytest.raises(InputError, match="fingerprint of views"):
        pretrain.run(dataclasses.replace(config, views=[], images=trained[1][0]))
    pretrain.run(config)
    assert per_step(str(tmp_path / "run")) == per_step(str(root / "exact"))
    assert weights_of(str(tmp_path / "run")) == weights_of(str(root / "exact"))


def on_exact_views(config, plan, world, log):
    """`train_loop` that renders as stored views were."""
    real = ingest.train_batches
    ingest.train_batches = functools.partial(real, fast=False)
    try:
        TRAIN_LOOP(config, plan, world, log)
    finally:
        ingest.train_batches = real


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_as_on_exact_views_and_as_one_does(
    trained, tmp_path, monkeypatch, ray_cluster
):
    """The group ends in the middle, and another one goes on."""
    root, tables = trained
    two = {"scaling": {"num_workers": 2}}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_loop", on_exact_views)
        pretrain.run(small_config(tables, tmp_path / "exact", **two))
    config = from_views(trained, tmp_path / "run", images="", **two)
    run_until(config, 8)
    pretrain.run(config)
    found, alone = per_step(str(tmp_path / "run")), per_step(str(root / "exact"))
    assert [attempt.workers for attempt in RunDir(config.output).attempts()] == [2, 2]
    assert found == per_step(str(tmp_path / "exact"))
    assert weights_of(str(tmp_path / "run")) == weights_of(str(tmp_path / "exact"))
    for step, (loss, samples) in alone.items():
        assert found[step][1] == samples
        assert found[step][0] == pytest.approx(loss, abs=5e-5)


MAE = {
    "objective": {"kind": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "model": {"absolute_positions": True, "relative_positions": "none"},
    "masking": {"kind": "random", "num_masked": 48},
    "tokens": [],
    "images": "",
}


def test_mae_needs_views_alone(trained, tmp_path):
    root, tables = trained
    views = write_views(ImageTable.open(tables[0]), tmp_path / "views", policy=CROPS)
    config = small_config(tables, tmp_path / "run", views=[views], **MAE)
    pretrain.run(config)
    assert len(per_step(str(tmp_path / "run"))) == 12
    with pytest.raises(InputError, match=r"policy\.brightness"):
        wrong = [str(root / "views")]
        pretrain.run(small_config(tables, tmp_path / "other", views=wrong, **MAE))


def test_probes_ask_for_images_before_anything_starts(trained, tmp_path):
    with pytest.raises(InputError, match=r"probe\.every_steps = 4: probes need images"):
        from_views(trained, tmp_path / "run", images="", probe={"every_steps": 4})
    with pytest.raises(InputError, match="images is empty"):
        pretrain.run(small_config(("", trained[1][1]), tmp_path / "run"))
