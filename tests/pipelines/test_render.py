"""The `render` stage: exactly once, resumable, whatever dies."""

import os
import signal

import pyarrow.parquet as pq
import pytest

from pipelines import render, unit_tables
from pipelines.errors import InputError, StageFailed
from pipelines.rendering import plan as render_plan
from pipelines.rendering import work as render_work
from pipelines.tables.image_table import ImageTable
from tests.chaos import world
from tests.pipelines.ingest_fixtures import write_images
from tests.pipelines.test_tokenize_images import contents
from tests.pipelines.two_drivers import render_units, verify_here
from tests.pipelines.view_fixtures import render_config, write_views

ROWS = 120


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return world.make_images(str(tmp_path_factory.mktemp("images")), count=ROWS)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory, ray_cluster):
    output = str(tmp_path_factory.mktemp("views") / "table")
    return output, render.run(render_config(images, output))


def deadly(unit, task):
    """`render_unit` that its process does not survive for the first rows of the second part."""
    if unit.start == 0 and unit.part["name"] == "part-00001.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
    return REAL(unit, task)


REAL = render_work.render_unit


def die_in_pool(batch, task, attempts):
    render_work.render_unit = deadly
    try:
        return render_work.render_batch(batch, task, attempts)
    finally:
        render_work.render_unit = REAL


@pytest.mark.ray
def test_a_table_is_that_of_one_process(finished, images, tmp_path):
    output, result = finished
    write_views(ImageTable.open(images), tmp_path / "alone")
    made, alone = contents(output), contents(tmp_path / "alone")
    names = [name for name in made if name.endswith(".parquet")]
    assert {name: made[name] for name in names} == {name: alone[name] for name in names}
    assert set(made) == {*names, "manifest.json"}
    assert result.units_computed == result.num_units == len(names)
    assert f"2 views of {ROWS} images" in result.summary()
    again = render.run(render_config(images, output))
    assert (again.units_computed, again.fingerprint) == (0, result.fingerprint)


@pytest.mark.ray
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(finished, images, tmp_path, monkeypatch):
    book, seen = unit_tables.book, []

    def interrupted(outcome, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(outcome.unit)
        return book(outcome, *rest)

    config = render_config(images, tmp_path / "t")
    monkeypatch.setattr(unit_tables, "book", interrupted)
    with pytest.raises(KeyboardInterrupt, match="images are done; the same command"):
        render.run(config)
    monkeypatch.undo()
    with pytest.raises(InputError, match="codec: 'zstd of uint8"):
        render.run(render_config(images, tmp_path / "t", form="jpeg95"))
    result = render.run(config)
    assert result.units_computed <= result.num_units - 2
    assert contents(tmp_path / "t") == contents(finished[0])


@pytest.mark.ray
def test_a_unit_that_kills_its_process_is_tried_alone(
    finished, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(render_work, "render_batch", die_in_pool)
    render.run(render_config(images, tmp_path / "t"))
    assert "set aside" in capsys.readouterr().err
    assert contents(tmp_path / "t") == contents(finished[0])


@pytest.mark.ray
def test_an_image_that_does_not_decode_rejects_its_unit(tmp_path, ray_cluster):
    images = write_images(str(tmp_path / "images"), change=40)
    with pytest.raises(StageFailed, match="max_rejected_units = 0: 1 units could not be made"):
        render.run(render_config(images.uri, tmp_path / "t"))
    result = render.run(render_config(images.uri, tmp_path / "t", max_rejected_units=1))
    assert result.rejected_units == 1
    table = render.ViewTable.open(str(tmp_path / "t"))
    assert 0 < table.num_missing < 40
    with pytest.raises(InputError, match="rows have no views"):
        table.check_compatible(
            image_fingerprint=images.fingerprint, policy=table.policy, image_size=32
        )


@pytest.mark.parametrize("name", ["images", "output"])
def test_an_empty_uri_is_named(name):
    config = render_config(**{"images_uri": "i", "output": "o"} | {
        {"images": "images_uri"}.get(name, name): ""
    })  # fmt: skip
    with pytest.raises(InputError, match=f"{name} is empty"):
        render.run(config)


def test_a_dry_run_writes_nothing(images, tmp_path, capsys):
    result = render.run(render_config(images, tmp_path / "t", dry_run=True))
    assert "would render views [0, 1] of 120 images" in capsys.readouterr().err
    assert result.summary().endswith("nothing was done (dry run)")
    assert not (tmp_path / "t").exists()


def test_a_dry_run_leaves_what_lies_beside_a_finished_table(images, tmp_path):
    output = tmp_path / "t"
    write_views(ImageTable.open(images), output)
    for name in ("_lease/.000001.json.0a1b2c3d.tmp", ".manifest.json.0a1b2c3d.tmp"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).touch()
    before = sorted(output.rglob("*"))
    render.run(render_config(images, output, dry_run=True))
    assert sorted(output.rglob("*")) == before
    render.run(render_config(images, output))
    assert not (output / "_lease").exists()


def test_files_without_receipts_are_taken_over_if_they_are_cut_as_the_table(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr(render, "_outcomes", render_units)
    monkeypatch.setattr(render, "_check_room", lambda task: None)
    monkeypatch.setattr(unit_tables, "_verified", verify_here)
    monkeypatch.setattr(render_plan, "ROW_GROUP_ROWS", 8)
    output, config = tmp_path / "t", render_config(images, tmp_path / "t")
    render.run(config)
    before = contents(output)
    (output / "manifest.json").unlink()
    table = pq.read_table(first := min(output.glob("*.parquet")))
    pq.write_table(table, first)  # in one row group
    result = render.run(config)
    assert (result.units_computed, contents(output)) == (1, before)


def test_a_cluster_without_room_is_refused_unless_it_grows(images, tmp_path, monkeypatch, capsys):
    task = render_plan.plan_task(render_config(images, tmp_path / "t"), ImageTable.open(images))
    head = {"Alive": True, "Resources": {"CPU": 0.0, "memory": 2e9}}
    monkeypatch.setattr(render.ray, "nodes", lambda: [head])
    monkeypatch.setattr(render, "autoscaled", lambda: False, raising=False)
    with pytest.raises(InputError, match=r"task_cpus: .* 0 CPU and 2 GB of memory on 1 node"):
        render._check_room(task)
    monkeypatch.setattr(render, "autoscaled", lambda: True)
    render._check_room(task)
    assert "the autoscaler is asked" in capsys.readouterr().err
