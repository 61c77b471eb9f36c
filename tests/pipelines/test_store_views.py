"""`tokenize --store_views`: two tables of one pass, each as its own stage makes it."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines import lease, render, storage, tokenize_images, unit_tables
from pipelines.config.lease import LeaseConfig
from pipelines.config.tokenize_images import stored_views
from pipelines.errors import InputError, StageFailed
from pipelines.reading import pixels
from pipelines.rendering import plan as render_plan
from pipelines.rendering.alongside import Alongside, alongside
from pipelines.tables.image_table import ImageTable
from pipelines.tokenization import ledger as token_ledger
from pipelines.tokenization import task as token_task
from tests.chaos import world
from tests.pipelines import two_drivers
from tests.pipelines.test_tokenize_images import contents
from tests.pipelines.view_fixtures import render_config, write_views
from tests.s3_server import bucket, s3  # noqa: F401 - fixtures

ROWS = 120
# Files of views reach over the ends of units of 20 rows.
VIEWS = {"view_size": 32, "view_rows_per_unit": 16}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return world.make_images(str(tmp_path_factory.mktemp("images")), count=ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return world.make_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


def without_ray(patch):
    """What Ray would do, in this process."""
    patch.setattr(tokenize_images, "_outcomes", two_drivers.tokenize_units)
    patch.setattr(render, "_outcomes", two_drivers.render_units)
    patch.setattr(render, "_check_room", lambda task: None)
    patch.setattr(unit_tables, "_verified", two_drivers.verify_here)
    node = {"Alive": True, "Resources": {"memory": 1e12}}
    cluster = SimpleNamespace(
        is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2}, nodes=lambda: [node]
    )
    patch.setattr(token_task, "ray", cluster)


@pytest.fixture
def here(monkeypatch):
    without_ray(monkeypatch)


@pytest.fixture(scope="module")
def apart(images, tokenizer, tmp_path_factory):
    """Both tables, each made by its own stage."""
    root = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        tokenize_images.run(world.make_config(images, tokenizer, root / "tokens"))
        render.run(views_config(images, root / "views"))
    return root


def views_config(images, output, **changes):
    return render_config(images, output, rows_per_unit=16, **changes)


def config_of(images, tokenizer, root, **changes):
    return world.make_config(
        images,
        tokenizer,
        storage.join(str(root), "tokens"),
        **VIEWS | {"store_views": storage.join(str(root), "views")} | changes,
    )


def reaching_over(images):
    """Rows of the files of views that have the end of a unit of tokens in them, with that end."""
    units = render_plan.RenderPlan.of(views_config(images, "x"), ImageTable.open(images)).units
    return [
        (first, first + rows, end)
        for first, rows in zip(units.first.tolist(), units.sizes.tolist(), strict=True)
        for end in range(20, ROWS, 20)
        if first < end < first + rows
    ]


def same(root, apart):
    """Byte for byte, and nothing else is left."""
    for table in ("tokens", "views"):
        assert contents(storage.join(str(root), table)) == contents(apart / table)


@pytest.mark.ray
def test_both_tables_are_those_of_their_own_stages(
    images, tokenizer, apart, tmp_path, ray_cluster, capsys
):
    result = tokenize_images.run(config_of(images, tokenizer, tmp_path))
    same(tmp_path, apart)
    # All of it was made in the pass.
    assert (result.units_computed, result.views.units_computed) == (6, 0)
    assert f"stored views: {tmp_path}/views: 2 views of {ROWS} images" in result.summary()
    again = tokenize_images.run(config_of(images, tokenizer, tmp_path))
    assert again.already_done
    assert capsys.readouterr().err.count("already done, 120 images") == 2


@pytest.mark.ray
def test_views_are_made_of_images_whose_tokens_are_copied(
    images, tokenizer, apart, tmp_path, ray_cluster
):
    reuse = {"reuse": [str(apart / "tokens")]}
    result = tokenize_images.run(config_of(images, tokenizer, tmp_path, **reuse))
    same(tmp_path, apart)
    assert (result.images_reused, result.views.units_computed) == (ROWS, 0)


def test_each_image_is_decoded_once_but_where_files_reach_over(
    here, images, tokenizer, apart, tmp_path, monkeypatch
):
    decoded, real = [], pixels.decode_image
    monkeypatch.setattr(pixels, "decode_image", lambda data: decoded.append(1) or real(data))
    result = tokenize_images.run(config_of(images, tokenizer, tmp_path))
    same(tmp_path, apart)
    assert result.views.units_computed == 0
    # At most half of each file that has the end of a unit in it.
    over = [min(end - first, last - end) for first, last, end in reaching_over(images)]
    assert over
    assert len(decoded) == ROWS + sum(over)


def test_each_file_of_views_goes_to_the_unit_of_its_middle():
    rows = [100, 7, 330]
    parts = [f"part-{number:05d}.parquet" for number in range(3)]
    tokens = token_ledger.plan_units(parts, rows, 30)
    views = token_ledger.plan_units(parts, rows, 13)
    todo = np.arange(len(views))[::2]
    given = Alongside(SimpleNamespace(units=views), todo, tokens)
    found = []
    for unit in range(len(tokens)):
        for index, start, stop in given.of(unit):
            found.append(index)
            assert tokens.part[unit] == views.part[index]
            assert tokens.start[unit] <= (start + stop) // 2 < tokens.stop[unit]
    assert found == todo.tolist()


@pytest.mark.parametrize("moment", ["before the tokens", "between the tables", "after some units"])
def test_a_run_that_is_killed_goes_on(
    here, images, tokenizer, apart, tmp_path, monkeypatch, moment
):
    """At the moment where nothing is saved any more, as if by SIGKILL."""
    config = config_of(images, tokenizer, tmp_path)
    commit, book, seen = token_ledger.Ledger.commit, unit_tables.book, []

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    def committed(ledger, manifest):
        if ledger.uri.endswith({"before the tokens": "tokens"}.get(moment, "views")):
            die()
        commit(ledger, manifest)

    def booked(outcome, ledger, most):
        seen.append(outcome)
        if moment == "after some units" and len(seen) == 9:
            monkeypatch.setattr(token_ledger.Ledger, "save", die)
            die()
        return book(outcome, ledger, most)

    monkeypatch.setattr(token_ledger.Ledger, "commit", committed)
    monkeypatch.setattr(unit_tables, "book", booked)
    with pytest.raises(Killed):
        tokenize_images.run(config)
    assert not (tmp_path / "views/manifest.json").exists()
    assert (tmp_path / "tokens/manifest.json").exists() == (moment == "between the tables")
    monkeypatch.undo()
    without_ray(monkeypatch)
    result = tokenize_images.run(config)
    same(tmp_path, apart)
    if moment != "after some units":
        assert (result.units_computed, result.views.units_computed) == (0, 0)


def test_tokens_that_are_there_are_left_and_views_are_rendered(
    here, images, tokenizer, apart, tmp_path, capsys
):
    shutil.copytree(apart / "tokens", tmp_path / "tokens")
    result = tokenize_images.run(config_of(images, tokenizer, tmp_path))
    same(tmp_path, apart)
    assert result.units_computed == 0
    assert result.views.units_computed == result.views.num_units
    assert "tokens: already done" in capsys.readouterr().err


def test_views_that_render_began_or_finished_are_kept(here, images, tokenizer, apart, tmp_path):
    shutil.copytree(apart / "views", tmp_path / "some/views")
    (tmp_path / "some/views/manifest.json").unlink()
    files = sorted((tmp_path / "some/views").glob("*.parquet"))
    for file in files[::2]:
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in files[1::2]}
    tokenize_images.run(config_of(images, tokenizer, tmp_path / "some"))
    same(tmp_path / "some", apart)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    shutil.copytree(apart / "views", tmp_path / "all/views")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "all/views").iterdir()}
    tokenize_images.run(config_of(images, tokenizer, tmp_path / "all"))
    same(tmp_path / "all", apart)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_what_does_not_fit_is_refused_before_anything_is_done(
    here, images, tokenizer, apart, tmp_path
):
    config = config_of(images, tokenizer, tmp_path, store_views=str(apart / "views"))
    for changes, message in (
        ({"view_form": "jpeg95"}, "codec: 'zstd of uint8.* != 'JPEG quality 95"),
        ({"view_size": 64}, "image_size: 32 != 64"),
        ({"view_rows_per_unit": 256}, "rows_per_unit: 16 != 256"),
        ({"first_view": 1}, r"views: \[0, 2\] != \[1, 3\]"),
    ):
        named = r"^store_views \(view_form, view_size, view_rows_per_unit\): .*"
        with pytest.raises(InputError, match=named + message):
            tokenize_images.run(dataclasses.replace(config, **changes))
    for spelling in (f"{tmp_path}/tokens", f"{tmp_path}/tokens/", f"file://{tmp_path}/./tokens"):
        with pytest.raises(InputError, match=r"store_views = '.*': give another URI than --output"):
            tokenize_images.run(config_of(images, tokenizer, tmp_path, store_views=spelling))
    for idle in ({"view_form": "jpeg95"}, {"view_size": 32}, {"view_rows_per_unit": 16}):
        ((name, value),) = idle.items()
        alone = world.make_config(images, tokenizer, tmp_path / "tokens", **idle)
        with pytest.raises(InputError, match=f"{name} = {value!r}: give --store_views"):
            tokenize_images.run(alone)
    assert not list(tmp_path.iterdir())


def test_tasks_that_hold_views_ask_for_their_memory(here, images, tokenizer, tmp_path, monkeypatch):
    """Of no more rows than a file can have, however many are asked for."""
    config = config_of(images, tokenizer, tmp_path, view_rows_per_unit=10_000)
    table, model = ImageTable.open(images), token_task.load_tokenizer(config)
    views = render_plan.plan_task(stored_views(config), table)
    alone = token_task.plan_task(config, table, model)
    task = token_task.plan_task(config, table, model, views=views)
    most = max(part.rows for part in table.parts)
    assert task.decode_memory == alone.decode_memory + 3 * most * 2 * 3 * 32**2
    node = {"Alive": True, "Resources": {"memory": alone.decode_memory}}
    monkeypatch.setattr(token_task.ray, "nodes", lambda: [node])
    token_task.plan_task(config, table, model)
    with pytest.raises(InputError, match=r"lower rows_per_unit, view_rows_per_unit or num_views"):
        token_task.plan_task(config, table, model, views=views)


def test_the_lease_is_free_where_no_file_is_to_be_made(images, apart, tmp_path):
    """All files are there, their manifest is not: another `render` may write it meanwhile."""
    shutil.copytree(apart / "views", tmp_path / "views")
    (tmp_path / "views/manifest.json").unlink()
    stop = LeaseConfig(when_held="stop")
    plan = render_plan.RenderPlan.of(
        views_config(images, tmp_path / "views"), ImageTable.open(images)
    )
    with alongside(plan, plan.units) as views:
        assert views is None
        with lease.held(plan.task.output, stop, stage="render"):
            pass


def test_a_dry_run_says_both_and_writes_nothing(here, images, tokenizer, tmp_path, capsys):
    tokenize_images.run(config_of(images, tokenizer, tmp_path, dry_run=True))
    said = capsys.readouterr().err
    assert "would tokenize views [0, 1] of 120 images" in said
    assert "would render views [0, 1] of 120 images" in said
    assert not list(tmp_path.iterdir())


def test_an_image_that_does_not_decode_rejects_a_unit_of_each_table(
    here, images, tokenizer, tmp_path, monkeypatch
):
    """In a row that a file of views shares with the unit before: that one has its tokens."""
    first, last, end = reaching_over(images)[0]
    row = end if end - first >= last - end else end - 1
    damaged = ImageTable.open(images).read_rows(row, row + 1)["image"][0].as_py()
    real = pixels.decode_image

    def decode(data):
        if data == damaged:
            raise pixels.UnusableImage("damaged")
        return real(data)

    monkeypatch.setattr(pixels, "decode_image", decode)
    config = config_of(images, tokenizer, tmp_path)
    with pytest.raises(StageFailed, match="max_rejected_units = 0: 1 units could not be made"):
        tokenize_images.run(config)
    result = tokenize_images.run(dataclasses.replace(config, max_rejected_units=1))
    assert (result.rejected_units, result.views.rejected_units) == (1, 1)
    alone = world.make_config(images, tokenizer, tmp_path / "alone", max_rejected_units=1)
    tokenize_images.run(alone)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "alone")
    monkeypatch.undo()
    without_ray(monkeypatch)
    tokenize_images.run(dataclasses.replace(config, retry_rejected=True))
    write_views(ImageTable.open(images), tmp_path / "sound", rows_per_unit=16)
    files = {name: data for name, data in contents(tmp_path / "sound").items() if "part" in name}
    assert {name: contents(tmp_path / "views")[name] for name in files} == files


def test_both_tables_may_lie_on_s3(here, images, tokenizer, apart, s3, bucket):  # noqa: F811
    root = s3.uri(bucket, "both")
    tokenize_images.run(config_of(images, tokenizer, root))
    same(root, apart)
