"""Features from actors are those of one process, whoever dies; damaged images are counted."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from beit.weights import save_weights
from pipelines import evaluate, storage
from pipelines.config.evaluate import EvaluateConfig, PoolConfig
from pipelines.config.protocol import ProtocolConfig
from pipelines.errors import InputError
from pipelines.evaluation import features as features_module
from pipelines.evaluation import pool
from pipelines.evaluation.extraction import Extraction, own_device
from pipelines.evaluation.features import (
    block_reader,
    check_memory,
    feature_width,
    free_memory,
    patch_reader,
    pixel_reader,
)
from pipelines.evaluation.labelled_images import joined, read_labelled
from pipelines.evaluation.pool import ComputeFeatures
from tests.pipelines.test_evaluate import MEAN, OFF, STD, picture, small_model, write_table


def tables_at(uri):
    """Labelled tables of 70 and 25 rows in several row groups, the first with a damaged image."""
    generator = np.random.default_rng(0)
    rows = [(picture(generator, index % 3), index % 3, None) for index in range(95)]
    rows[40] = (rows[40][0][:90], *rows[40][1:])
    tables = storage.join(uri, "train"), storage.join(uri, "test")
    for table, some in zip(tables, (rows[:70], rows[70:]), strict=True):
        write_table(table, some)
    return tables


def extraction(tables, **options):
    config = EvaluateConfig(
        run="r", images=tables[0], test_images=tables[1], batch_size=16, max_rejected=1, **options
    )
    protocol = ProtocolConfig()
    data = joined(read_labelled(tables[0], protocol), read_labelled(tables[1], protocol, test=True))
    return Extraction(config=config, data=data, device="cpu", num_threads=2)


def read(images):
    """What blocks, patches and pixels are, by name."""
    network = small_model().eval()
    options = {"mean": MEAN, "std": STD}
    readers = {
        "blocks": block_reader(network, layers=[1, 3], pooling="grid", **options),
        "patches": patch_reader(network, layers=[2], **options),
        "pixels": pixel_reader(95),
    }
    return images.read(readers, [network], label="")


class DiesOnce(ComputeFeatures):
    """Its process is killed with the third unit in its hands; the next one is not."""

    def compute(self, unit):
        died = Path(self.task.tables[0][0], "died")
        if unit.index == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(unit)


class Dies(ComputeFeatures):
    def compute(self, unit):
        if unit.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(unit)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "actor"),
    [
        (1, DiesOnce),
        pytest.param(2, ComputeFeatures, marks=pytest.mark.long),
        pytest.param(1, Dies, marks=pytest.mark.long),
    ],
)
def test_actors_find_what_one_process_finds(
    num_workers, actor, tmp_path, ray_cluster, monkeypatch, one_thread
):
    """To the bit and in the same rows, in units that end at tables and batches."""
    tables = tables_at(str(tmp_path))
    alone = extraction(tables)
    expected = read(alone)
    assert list(alone.damaged) == [40]
    monkeypatch.setattr(pool, "UNIT_IMAGES", 16)
    monkeypatch.setattr(pool, "ComputeFeatures", actor)
    images = extraction(tables, scaling=PoolConfig(num_workers=num_workers))
    found = read(images)
    assert images.damaged == alone.damaged
    assert found.keys() == expected.keys()
    for name, features in expected.items():
        assert features.dtype == found[name].dtype
        assert np.array_equal(features, found[name])
        assert not features[:, 40].any() and features[:, 41].any()
    assert (tmp_path / "train/died").exists() == (actor is DiesOnce)


@pytest.mark.ray
@pytest.mark.slow
def test_what_an_actor_refuses_at_its_start_is_said_in_one_sentence(tmp_path, ray_cluster):
    """It came as a traceback of Ray Data."""
    images = extraction(tables_at(str(tmp_path)), scaling=PoolConfig(num_workers=1))
    (tmp_path / "test/manifest.json").unlink()
    with pytest.raises(InputError, match=r"^unit of images 0 to \d+: .*test: no finished image ta"):
        read(images)


def test_units_are_whole_batches_of_one_table(tmp_path):
    tables = tables_at(str(tmp_path))
    data = extraction(tables).data
    units = pool.plan_units(data, batch_size=16, image_bytes=pool.UNIT_BYTES // 40)
    assert [(unit.table, unit.start, len(unit.rows)) for unit in units] == [
        (0, 0, 32), (0, 32, 32), (0, 64, 6), (1, 70, 25),
    ]  # fmt: skip
    assert [row for unit in units for row in unit.rows] == [*range(70), *range(25)]
    least = pool.plan_units(data, batch_size=16, image_bytes=10**9)
    assert len(least[0].rows) == 16


def test_damaged_images_are_counted_and_bounded(tmp_path):
    generator = np.random.default_rng(0)
    rows = [(picture(generator, index % 3), index % 3, None) for index in range(40)]
    rows[7] = (rows[7][0][:90], *rows[7][1:])
    save_weights(small_model(), tmp_path / "run", extra={"pixel_mean": MEAN, "pixel_std": STD})
    options = {
        "run": str(tmp_path / "run"), "images": write_table(tmp_path / "table", rows),
        "num_folds": 2, "layers": [2], "attentive": False, "baselines": False, "tracking": OFF,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"max_rejected = 0: 1 images .*'00007' .*beit audit"):
        evaluate.run(EvaluateConfig(**options))
    result = evaluate.run(EvaluateConfig(**options, max_rejected=1))
    assert (result.num_images, result.damaged) == (39, 1)
    assert "39 images (1 left out: they do not decode)" in result.summary()
    [told] = storage.read_json(f"{result.output}/evaluation.json")["damaged"]
    assert "'00007'" in told
    assert evaluate.run(EvaluateConfig(**options, max_rejected=5)).already_done
    with pytest.raises(InputError, match="max_rejected = 0"):
        evaluate.run(EvaluateConfig(**options))


def test_a_table_that_was_replaced_is_refused(tmp_path):
    [table, _] = tables_at(str(tmp_path))
    with pytest.raises(InputError, match="the table was replaced while its features"):
        pool.open_table(table, "another")


@pytest.mark.parametrize(
    ("device", "num_workers", "said"),
    [("mps", 1, "auto, cpu or cuda"), ("cuda:1", 2, "auto, cpu or cuda"),
     ("cuda:99", 0, "cannot compute on it here"), ("gpu", 0, "cannot compute on it here"),
     ("hpu", 0, "cannot compute on it here")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(device, num_workers, said):
    """With actors another device than a GPU was taken for the CPU, in silence."""
    scaling = PoolConfig(num_workers=num_workers)
    config = EvaluateConfig(run="none", images="none", device=device, scaling=scaling)
    with pytest.raises(InputError, match=f"^device = '{device}': .*{said}"):
        own_device(config)


def test_what_memory_cannot_hold_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
    [table, _] = tables_at(str(tmp_path))
    save_weights(small_model(), tmp_path / "run", extra={"pixel_mean": MEAN, "pixel_std": STD})
    options = {"run": str(tmp_path / "run"), "images": table, "tracking": OFF}
    monkeypatch.setattr(features_module, "free_memory", lambda: 600_000)
    said = r"^max_images: probes on 768 features of 70 images need 0\.0 GB of memory.*baselines"
    with pytest.raises(InputError, match=said):
        evaluate.run(EvaluateConfig(**options))
    check_memory(70, 714, "cpu")
    network = small_model()
    assert feature_width(network, "grid", 70, pixels=False) == 16 * 24
    assert feature_width(network, "mean", 70, pixels=True) == 3 * 16 * 16


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = free_memory()
    monkeypatch.setattr(features_module, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == pytest.approx(whole, rel=0.5)
    for name, text in (
        ("max", "9000\n"), ("current", "5000\n"), ("stat", "anon 1\ninactive_file 700\n")
    ):  # fmt: skip
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 4700
