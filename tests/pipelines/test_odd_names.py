"""Any name, anywhere: files, folders, members, outputs and the working directory."""

import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pipelines import prepare, storage
from pipelines.config.prepare import PrepareConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.preparation.decode_process import Rules
from pipelines.preparation.source_plan import make_plan
from pipelines.preparation.unit import PrepareTask, process_unit
from pipelines.tables.image_table import ImageTable
from pipelines.tracking.store import (
    absolute_tracking_uri,
    artifact_location,
    connect,
    database_path,
)
from tests.names import ODD_NAMES
from tests.pipelines.image_sources import encoded, tar_bytes

DATA = Path(__file__).parents[1] / "data" / "v0.1.0"
PLACE = 'a #b c:d"e\n\x1b]0;title\x07 \u5199 cafe\u0301'


def prepared(source: Path, output: Path, **options: str) -> ImageTable:
    """The table of a source, made in this process."""
    config = PrepareConfig(source=str(source), output=str(output), **options)
    plan = make_plan(config, str(output))
    task = PrepareTask(
        output=str(output),
        reader=plan.reader,
        rules=Rules(max_pixels=10**6),
        decode_timeout=60,
        part_bytes=10**8,
        row_group_bytes=10**6,
        digits=5,
    )
    for unit, listing in enumerate(plan.listings):
        process_unit(task, unit, listing)
    prepare._commit(config, str(output), plan)
    return ImageTable.open(str(output))


def keys_of(table: ImageTable) -> list[str]:
    return table.read_rows(0, table.num_rows, ["key"])["key"].to_pylist()


def test_files_and_folders_of_any_name_are_rows_and_classes(tmp_path):
    names = [f"{name}/{name}.png" for name in ODD_NAMES]
    for number, name in enumerate(names):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(encoded(number, "PNG"))
    table = prepared(tmp_path / "source", tmp_path / "out")
    assert keys_of(table) == sorted(names)
    folders = [table.class_names[label] for label in table.labels()]
    both = {"cafe\u0301": "caf\u00e9"}  # two spellings of one class
    assert folders == [both.get(k.split("/")[0], k.split("/")[0]) for k in sorted(names)]


def test_members_of_tars_and_keys_of_rows_may_have_any_name(tmp_path):
    # A sample's name ends at its first dot; `*.png` makes an image of every member.
    names = [f"{number:02d}{name}.png" for number, name in enumerate(ODD_NAMES)]
    pictures = [encoded(number, "PNG") for number in range(len(names))]
    for kind in ("tars", "rows"):
        (tmp_path / kind).mkdir()
    (tmp_path / "tars/a #1.tar").write_bytes(tar_bytes(list(zip(names, pictures, strict=True))))
    found = keys_of(prepared(tmp_path / "tars", tmp_path / "tar", labels="none"))
    assert found == sorted(f"a #1.tar/{name}" for name in names)
    pq.write_table(pa.table({"image": pictures, "id": names}), tmp_path / "rows/a %1.parquet")
    found = keys_of(prepared(tmp_path / "rows", tmp_path / "row", key_field="id"))
    assert found == sorted(f"a %1.parquet/{name}" for name in names)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_of_any_name_are_stored_and_listed(tmp_path, name):
    uri = storage.join(str(tmp_path), name, name)
    assert storage.create(uri, b"1")
    storage.write_bytes(uri, b"22")
    assert storage.read_bytes(uri) == b"22"
    assert [file.path for file in storage.list_files(str(tmp_path))] == [f"{name}/{name}"]
    storage.fetch_dir(str(tmp_path), tmp_path / "copy")
    assert (tmp_path / "copy" / name / name).read_bytes() == b"22"
    storage.delete_prefix(storage.join(str(tmp_path), name))
    assert not storage.exists(storage.join(str(tmp_path), name))


def test_a_chain_in_a_directory_of_any_name(tmp_path, monkeypatch, capsys):
    place = tmp_path / PLACE
    shutil.copytree(DATA, place)
    monkeypatch.chdir(place)
    flags = ["--config=recipes/pretrain.yaml", "--optim.steps=4", "--tracking.enabled=true"]
    assert cli.main(["pretrain", *flags, "--output=out ?#%20"]) == 0
    assert cli.main(["export", "--run=out ?#%20", "--output=export ?#%20"]) == 0
    assert cli.main(["audit", "images"]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\\x1b]0;title\\x07" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [PLACE]
    with sqlite3.connect(place / "mlflow.db") as database:
        values = [value for (value,) in database.execute("select value from tags")]
        values += [value for (value,) in database.execute("select value from params")]
    assert any("out ?#%20" in value for value in values)
    assert not any("\x1b" in value for value in values)
    assert list((place / "mlartifacts").rglob("report.json"))


def test_the_database_lies_where_it_is_meant(tmp_path, monkeypatch):
    (tmp_path / "50% what?").mkdir()
    monkeypatch.chdir(tmp_path / "50% what?")
    connect(absolute_tracking_uri("sqlite:///it's #1.db"))
    assert [path.name for path in tmp_path.iterdir()] == ["50% what?"]
    assert Path("it's #1.db").exists()
    uri = absolute_tracking_uri("")
    assert uri == absolute_tracking_uri(uri) == absolute_tracking_uri("sqlite:///mlflow.db")
    assert database_path(uri) == Path.cwd() / "mlflow.db"
    assert uri.endswith("/50%25 what%3F/mlflow.db")
    assert artifact_location(TrackingConfig(), "sqlite:////a/50%/x.db") == (
        "file:///a/50%25/mlartifacts/beit"
    )
