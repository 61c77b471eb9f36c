import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.data

from beit.images import decode_image
from beit.views import ViewPolicy, render, render_all, sample_view
from pipelines import storage, tokenize_images, unit_pools, unit_tables
from pipelines.config.tokenize_images import (
    ActorsConfig,
    GateConfig,
    TokenizeConfig,
)
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import MISSING, TokenTable, check_together
from pipelines.tokenization import pool as token_pool
from pipelines.tokenization import report as token_report
from pipelines.tokenization import task as token_task
from pipelines.tokenization.gate import Gate
from pipelines.tokenization.ledger import Ledger, plan_units
from pipelines.units import Outcome
from tests.chaos import world

ROWS = 240


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return world.make_images(str(tmp_path_factory.mktemp("images")), count=ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return world.make_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def finished(images, tokenizer, tmp_path_factory, ray_cluster):
    output = str(tmp_path_factory.mktemp("tokens") / "table")
    result = tokenize_images.run(world.make_config(images, tokenizer, output))
    return output, result


def contents(directory):
    """Every file of a table; what a killed writer left under a temporary name is none."""
    return {
        file.path: storage.read_bytes(storage.join(str(directory), file.path))
        for file in storage.list_files(str(directory))
    }


# -- without Ray ---------------------------------------------------------------------------


def test_units_cover_every_row_once():
    units = plan_units(["a", "b", "c"], [100, 7, 33], 10)
    rows = [
        (int(part), row)
        for part, start, stop in zip(units.part, units.start, units.stop, strict=True)
        for row in range(start, stop)
    ]
    assert rows == [(part, row) for part, count in enumerate([100, 7, 33]) for row in range(count)]
    assert units.sizes.max() == 10
    assert units.sizes.min() >= 7
    assert units.name(10) == "b-00000000-00000007.parquet"
    assert list(units.first[-4:]) == [107, 115, 123, 131]


def test_a_ledger_knows_what_was_committed(tmp_path):
    units = plan_units(["part-00000.parquet"], [40], 10)
    ledger = Ledger(str(tmp_path), units)
    for unit in (0, 2):
        (tmp_path / units.name(unit)).write_bytes(b"x" * (unit + 1))
    ledger.add(0, 1, "ab" * 16)
    ledger.save()
    ledger.reject(3, "bad")
    again = Ledger(str(tmp_path), units)
    # Unit 2 has a file but no receipt: it must be read before it is believed.
    assert list(again.load()) == [2]
    assert again.rejected == {3: "bad"}
    assert list(again.todo()) == [1, 2]
    assert [file.hash for file in again.files()] == ["ab" * 16]
    # A file that changed size is not the one of the receipt.
    (tmp_path / units.name(0)).write_bytes(b"longer")
    assert again.changed_files() == [0]
    third = Ledger(str(tmp_path), units)
    assert list(third.load()) == [0, 2]
    third.retry_rejected()
    assert list(third.todo()) == [0, 1, 2, 3]


def test_the_gate_does_not_wait_for_units_that_were_given_up(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(
        tokenize_images.token_report,
        "check_usage",
        lambda task, names, options: looked_at.append(names),
    )
    units = plan_units(["part-00000.parquet"], [40], 10)
    ledger = Ledger(str(tmp_path), units)
    config = TokenizeConfig(
        images="i", tokenizer="t", output="o", gate=GateConfig(min_codes=2, num_units=4)
    )
    gate = Gate(config, None, ledger)
    assert list(gate.first(np.arange(4))) == [0, 1, 2, 3]
    ledger.add(0, 1, "ab" * 16)
    ledger.reject(1, "bad")
    ledger.add(2, 1, "ab" * 16)
    gate.check()
    assert not looked_at
    gate.skip(3)
    gate.check()
    gate.check(last=True)
    assert looked_at == [[units.name(0), units.name(2)]]


def test_the_rows_that_are_done_are_counted(tmp_path):
    ledger = Ledger(str(tmp_path), plan_units(["a"], [25], 10))
    for unit in (0, 1, 1):
        ledger.add(unit, 1, "ab" * 16)
    assert ledger.rows_done == ledger.units.sizes[:2].sum()
    ledger.forget(0)
    ledger.forget(0)
    assert ledger.rows_done == ledger.units.rows(1)


def test_a_file_that_only_its_worker_sees_ends_the_stage(tmp_path):
    ledger = Ledger(str(tmp_path), plan_units(["a"], [25], 10))
    with pytest.raises(InputError, match="nodes see different disks"):
        unit_tables._check_shared(ledger, 1)
    (tmp_path / ledger.units.name(1)).touch()
    unit_tables._check_shared(ledger, 1)


def test_actors_are_given_enough_for_the_pool_to_grow():
    """Ray Data adds actors above this; see test_the_pool_grows for the whole of it."""
    scaling = ray.data.DataContext.get_current().autoscaling_config
    threshold = scaling.actor_pool_util_upscaling_threshold
    assert threshold <= unit_pools.UNITS_PER_ACTOR / unit_pools.UNITS_AT_WORK


# -- the whole stage -----------------------------------------------------------------------


@pytest.mark.ray
def test_cached_tokens_equal_online_tokens(finished, images, tokenizer):
    """200 random (image, view): the table's tokens are those of the replayed view, exactly."""
    table, source = TokenTable.open(finished[0]), ImageTable.open(images)
    table.check_compatible(source)
    encoder = tokenizer_store.load(tokenizer)
    generator = np.random.default_rng(1)
    import torch

    for _ in range(200):
        row, view = int(generator.integers(ROWS)), int(generator.integers(2))
        record = source.read_rows(row, row + 1).to_pylist()[0]
        image = decode_image(record["image"])
        drawn = sample_view(table.policy, record["digest"], view, image.height, image.width)
        pixels = render(image, drawn, encoder.image_size, encoder.interpolation)
        batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
        online = encoder.encode(batch)[0].numpy()
        keys, cached, levels = table.read_with_levels(row, row + 1)
        assert keys == [record["key"]]
        assert levels[0, view] == render_all(image, drawn, [])[1]
        np.testing.assert_array_equal(cached[0, view].astype(np.int64), online)


@pytest.mark.ray
def test_a_finished_table_says_what_it_is(finished, images):
    output, result = finished
    table = TokenTable.open(output)
    assert result.fingerprint == table.fingerprint
    assert result.units_computed == result.num_units == table.num_files == 12
    assert table.num_rows == ROWS
    assert table.manifest["libraries"].keys() == {"numpy", "pillow", "pyarrow", "torch"}
    assert not (Path(output) / "_work").exists()
    hashes = table.manifest["files"]["hash"]
    for index in range(table.num_files):
        data = storage.read_bytes(storage.join(output, table.file_name(index)))
        assert storage.digest(data) == hashes[index]
    keys, _ = table.read_rows(0, ROWS)
    assert keys == ImageTable.open(images).read_rows(0, ROWS)["key"].to_pylist()


@pytest.mark.ray
def test_the_same_command_again_does_nothing(finished, images, tokenizer, capsys):
    output, result = finished
    before = contents(output)
    again = tokenize_images.run(world.make_config(images, tokenizer, output))
    assert again.units_computed == 0
    assert again.fingerprint == result.fingerprint
    assert "already done" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.ray
def test_a_lost_file_of_a_finished_table_is_made_again(finished, images, tokenizer, tmp_path):
    output = tmp_path / "table"
    shutil.copytree(finished[0], output)
    (output / "part-00000-00000000-00000020.parquet").unlink()
    result = tokenize_images.run(world.make_config(images, tokenizer, output))
    assert result.units_computed == 1
    assert contents(output) == contents(finished[0])


@pytest.fixture(scope="module")
def grown_from(tokenizer, tmp_path_factory):
    """How to reuse tokens of 226 images, which have other names there: all of the first five units,
    nine of ten of the others."""
    root = tmp_path_factory.mktemp("older")
    kept = {number for number in range(ROWS) if number < 100 or number % 10}
    older = ImageTable.open(world.make_images(str(root / "images"), keep=kept, prefix="z"))
    world.write_tokens(older, tokenizer, str(root / "tokens"))
    return {"reuse": [str(root / "tokens")], "reuse_images": [older.uri]}


@pytest.mark.ray
def test_a_table_that_reuses_tokens_is_that_of_a_whole_run(
    finished, images, tokenizer, grown_from, tmp_path, monkeypatch, mlflow_uri, capsys
):
    from mlflow import MlflowClient

    book, seen = unit_tables.book, []

    def interrupted(outcome, ledger, options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(outcome.facts["reused"])
        return book(outcome, ledger, options)

    tracking = TrackingConfig(uri=mlflow_uri, experiment="reuse")
    config = world.make_config(images, tokenizer, tmp_path / "t", tracking=tracking, **grown_from)
    monkeypatch.setattr(unit_tables, "book", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_images.run(config)
    assert "226 of 240 images have their tokens there" in capsys.readouterr().err
    monkeypatch.undo()
    result = tokenize_images.run(config)
    assert contents(tmp_path / "t") == contents(finished[0])
    assert min(seen) >= 18
    assert 226 - sum(seen) >= result.images_reused >= 18 * result.units_computed
    told = f"reused {result.images_reused} of 240 images" in result.summary()
    assert told == (result.images_reused > 0)
    older = TokenTable.open(grown_from["reuse"][0])
    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name("reuse").experiment_id
    for run in client.search_runs([experiment]):
        assert run.data.tags["beit.input.token_table"] == older.fingerprint


@pytest.mark.ray
def test_a_unit_that_no_node_can_hold_is_refused(images, tokenizer, tmp_path, monkeypatch):
    small = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": 100_000.0}}]
    monkeypatch.setattr(token_task.ray, "nodes", lambda: small)
    with pytest.raises(InputError, match=r"rows_per_unit: a unit of 80 rows .* 0\.0 GB; lower"):
        tokenize_images.run(
            world.make_config(images, tokenizer, tmp_path / "table", rows_per_unit=1_000_000)
        )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("encoders", "missing"),
    [
        (ActorsConfig(min_actors=99), r"99 actors and a decode task need 100 CPUs and 0 GPUs"),
        (ActorsConfig(num_gpus=1), r"1 actors and a decode task need 1 CPUs and 1 GPUs"),
    ],
)
def test_nodes_are_waited_for_where_they_were_asked_for(
    encoders, missing, images, tokenizer, tmp_path, ray_cluster, capsys
):
    config = world.make_config(
        images, tokenizer, tmp_path / "table", encoders=encoders, dry_run=True
    )
    if encoders.num_gpus is None:
        with pytest.raises(InputError, match=missing):
            tokenize_images.run(config)
        encoders = dataclasses.replace(encoders, max_actors=99)
    tokenize_images.run(dataclasses.replace(config, encoders=encoders))
    said = capsys.readouterr().err
    assert re.search(missing, said)
    assert "waiting for more nodes" in said


@pytest.mark.ray
@pytest.mark.long
def test_the_pool_grows(images, tokenizer, tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(token_pool, "EncodeUnits", world.EncodeSlowly)
    book, actors = unit_tables.book, set()

    def noting(outcome, ledger, options):
        actors.add(outcome.facts["seconds"]["pid"])
        return book(outcome, ledger, options)

    monkeypatch.setattr(unit_tables, "book", noting)
    config = world.make_config(
        images, tokenizer, tmp_path / "table", encoders=ActorsConfig(max_actors=2), rows_per_unit=8
    )
    tokenize_images.run(config)
    assert len(actors) == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "replacement"),
    [
        ("render_blocks", world.render_and_fail),
        pytest.param("EncodeUnits", world.EncodeAndFail, marks=pytest.mark.long),
        ("EncodeUnits", world.EncodeAndFault),
    ],
)
def test_a_unit_whose_work_fails_is_tried_again_alone(
    stage, replacement, finished, images, tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(token_pool, stage, replacement)
    config = world.make_config(images, tokenizer, tmp_path / "table")
    result = tokenize_images.run(config)
    assert "1 units were set aside and are now tried alone" in capsys.readouterr().err
    assert (result.units_computed, result.rejected_units) == (12, 0)
    assert contents(tmp_path / "table") == contents(finished[0])


@pytest.mark.ray
def test_work_that_fails_everywhere_ends_the_stage(
    images, tokenizer, tmp_path, ray_cluster, monkeypatch
):
    monkeypatch.setattr(token_pool, "EncodeUnits", world.EncodeNothing)
    monkeypatch.setattr(unit_pools, "ASIDE_IN_A_ROW", 3)
    config = world.make_config(images, tokenizer, tmp_path / "table")
    with pytest.raises(StageFailed, match=r"out of memory \(and 3 units before it\)"):
        tokenize_images.run(config)


@pytest.mark.ray
def test_other_options_on_the_same_output_are_refused_by_name(
    finished, images, tokenizer, tmp_path
):
    output, _ = finished
    with pytest.raises(InputError, match=r"views: \[0, 2\] != \[0, 3\]"):
        tokenize_images.run(world.make_config(images, tokenizer, output, num_views=3))
    with pytest.raises(InputError, match=r"policy\.seed: 0 != 9"):
        policy = ViewPolicy(seed=9)
        tokenize_images.run(world.make_config(images, tokenizer, output, policy=policy))
    with pytest.raises(InputError, match="rows_per_unit: 20 != 40"):
        tokenize_images.run(world.make_config(images, tokenizer, output, rows_per_unit=40))
    with pytest.raises(InputError, match="not 'token_table'"):
        tokenize_images.run(world.make_config(images, tokenizer, images))
    other = world.make_tokenizer(str(tmp_path / "other"), seed=1)
    with pytest.raises(InputError, match="tokenizer_fingerprint"):
        tokenize_images.run(world.make_config(images, other, output))
    # The same for a table that was only begun.
    begun = tmp_path / "begun"
    shutil.copytree(output, begun)
    manifest = json.loads((begun / "manifest.json").read_text())
    (begun / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"precision: 'float32' != 'float16'"):
        tokenize_images.run(world.make_config(images, tokenizer, begun, precision="float16"))
    # Files without receipts are read, believed, and completed.
    shutil.rmtree(begun / "_work")
    (begun / "part-00001-00000020-00000040.parquet").write_bytes(b"half a file")
    (begun / "part-00002-00000000-00000020.parquet").unlink()
    result = tokenize_images.run(world.make_config(images, tokenizer, begun))
    assert result.units_computed == 2
    assert result.fingerprint == manifest["fingerprint"]
    assert contents(begun) == contents(output)


@pytest.mark.ray
def test_views_can_be_added_later_and_a_run_is_recorded(
    finished, images, tokenizer, tmp_path, mlflow_uri
):
    from mlflow import MlflowClient

    config = world.make_config(
        images,
        tokenizer,
        tmp_path / "more",
        first_view=1,
        num_views=2,
        tracking=TrackingConfig(uri=mlflow_uri, experiment="x"),
    )
    result = tokenize_images.run(config)
    first, more = TokenTable.open(finished[0]), TokenTable.open(str(tmp_path / "more"))
    assert more.views == range(1, 3)
    # View 1 is in both, and is the same.
    np.testing.assert_array_equal(
        first.read_rows(0, ROWS)[1][:, 1], more.read_rows(0, ROWS)[1][:, 0]
    )
    with pytest.raises(InputError, match="view 1 is in both"):
        check_together([first, more])

    client = MlflowClient(mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["beit.input.image_table"] == ImageTable.open(images).fingerprint
    assert run.data.tags["beit.input.tokenizer"] == more.tokenizer_fingerprint
    assert run.data.tags["beit.output.token_table"] == result.fingerprint
    assert run.data.metrics["codes_used"] == result.codes_used
    assert run.data.params["rows_per_unit"] == "20"
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "images")}
    assert any("code" in path for path in pictures)
    assert any("views" in path for path in pictures)


@pytest.mark.ray
def test_a_dry_run_touches_nothing(finished, images, tokenizer, tmp_path, capsys):
    config = world.make_config(images, tokenizer, tmp_path / "none", dry_run=True)
    assert tokenize_images.run(config).units_computed == 0
    assert "12 of 12 units to do" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    shutil.copytree(finished[0], tmp_path / "t")
    (tmp_path / "t/_lease").mkdir()
    (tmp_path / "t/_lease/.000001.json.0a1b2c3d.tmp").touch()
    before = sorted(tmp_path.rglob("*"))
    tokenize_images.run(dataclasses.replace(config, output=str(tmp_path / "t")))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.ray
def test_a_collapsed_tokenizer_is_stopped(images, tokenizer, tmp_path, ray_cluster):
    gate = GateConfig(min_codes=65, num_units=3)
    config = world.make_config(images, tokenizer, tmp_path / "t", gate=gate)
    with pytest.raises(StageFailed, match=r"collapsed: gate\.min_codes = 65"):
        tokenize_images.run(config)
    # What was done before the gate closed is kept; a lower gate goes on with it.
    passing = dataclasses.replace(config, gate=GateConfig(min_codes=2, num_units=3))
    assert tokenize_images.run(passing).units_computed < 12


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["render", pytest.param("encode", marks=pytest.mark.long)])
def test_a_unit_that_kills_its_process_is_quarantined(
    stage, finished, images, tokenizer, tmp_path, monkeypatch
):
    if stage == "render":
        monkeypatch.setattr(token_pool, "render_blocks", world.render_and_die)
    else:
        monkeypatch.setattr(token_pool, "EncodeUnits", world.EncodeAndDie)
    monkeypatch.setattr(token_pool, "tokenize_alone", world.alone_and_die)
    output = tmp_path / "table"
    config = world.make_config(images, tokenizer, output)
    with pytest.raises(StageFailed, match=r"part-00001-00000040-00000060\.parquet \(killed its"):
        tokenize_images.run(config)
    assert not (output / "manifest.json").exists()
    # The verdict is remembered: nothing is tried again, nothing else was lost.
    with pytest.raises(StageFailed, match="max_rejected_units = 0"):
        tokenize_images.run(config)
    allowed = tokenize_images.run(dataclasses.replace(config, max_rejected_units=1))
    assert (allowed.units_computed, allowed.rejected_units) == (0, 1)
    table = TokenTable.open(str(output))
    assert table.num_missing == 20
    keys, token_ids = table.read_rows(119, 141)
    assert (token_ids[1:21] == MISSING).all()
    assert keys[0]
    assert keys[21]
    with pytest.raises(InputError, match="rejected: 20 of 240 rows"):
        table.check_compatible(ImageTable.open(images))
    # With the cause gone, the units are made on request, and the table is as if nothing had been.
    monkeypatch.undo()
    assert tokenize_images.run(dataclasses.replace(config, max_rejected_units=1)).rejected_units
    mended = tokenize_images.run(dataclasses.replace(config, retry_rejected=True))
    assert (mended.units_computed, mended.rejected_units) == (1, 0)
    assert contents(output) == contents(finished[0])


@pytest.mark.ray
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(
    finished, images, tokenizer, tmp_path, monkeypatch
):
    config = world.make_config(images, tokenizer, tmp_path / "t")
    book, seen = unit_tables.book, []

    def interrupted(outcome, ledger, options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(outcome.unit)
        return book(outcome, ledger, options)

    sent = []
    monkeypatch.setattr(token_report.Meter, "flush", lambda meter: sent.append(meter.units))
    monkeypatch.setattr(unit_tables, "book", interrupted)
    with pytest.raises(KeyboardInterrupt, match="60 of 240 images are done; the same command"):
        tokenize_images.run(config)
    assert sent[-1:] == [3]
    monkeypatch.undo()
    result = tokenize_images.run(config)
    assert result.units_computed <= 12 - 3
    assert contents(tmp_path / "t") == contents(finished[0])


@pytest.mark.parametrize("name", ["images", "tokenizer", "output"])
def test_an_empty_uri_is_named(name):
    config = TokenizeConfig(**{"images": "i", "tokenizer": "t", "output": "o"} | {name: ""})
    with pytest.raises(InputError, match=f"{name} is empty"):
        tokenize_images.run(config)


@pytest.mark.ray
def test_without_images_the_message_says_what_to_do(tmp_path, tokenizer, ray_cluster):
    with pytest.raises(InputError, match="beit prepare"):
        tokenize_images.run(world.make_config(tmp_path / "no", tokenizer, tmp_path / "t"))
    with pytest.raises(InputError, match="tokenizer"):
        images = world.make_images(str(tmp_path / "images"), count=6)
        tokenize_images.run(world.make_config(images, tmp_path / "no", tmp_path / "t"))


def test_what_an_encoder_refuses_at_its_start_is_said_by_its_units(monkeypatch):
    """Raised in a constructor, it would reach the user as a traceback of Ray Data."""

    def refuse(_):
        raise InputError("encoders.num_gpus = 1: no CUDA device")

    monkeypatch.setattr(token_pool, "open_tokenizer", refuse)
    unit = {"index": 0, "part": {"name": "part-00000.parquet"}, "start": 0, "stop": 4}
    rows = pa.table({"unit": [json.dumps(unit)], "note": ["{}"], "pixels": [b""]})
    said = token_pool.EncodeUnits(None, None)(rows)["outcome"].to_pylist()
    with pytest.raises(InputError, match=r"^unit .*: encoders\.num_gpus = 1: no CUDA device$"):
        Outcome.from_json(said[0]).check()
