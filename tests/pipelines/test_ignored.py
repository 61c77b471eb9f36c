"""Files beside pictures are no bad pictures: ignored, counted apart, listed, no reason to stop."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beit.images import FORMATS, recognised
from pipelines import prepare
from pipelines.audit import run as audit
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError, StageFailed
from pipelines.preparation.report import Totals
from pipelines.preparation.source_plan import read_plan
from pipelines.preparation.sources import open_source
from pipelines.tables.image_table import ImageTable
from tests.pipelines.image_sources import encoded, hf_table, tar_bytes, write_folder, write_parquet
from tests.pipelines.prepare_fixtures import config_of, work_off

JPEG = encoded(1)
APPLE_DOUBLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(4072)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"7" * 64 + b"\nsize 146946961\n"
)


def lay(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def prepared(source: object, **fields) -> tuple[ImageTable, dict[str, str], dict[str, str]]:
    """The table, and reasons by key: of what was rejected, of what was ignored."""
    output = Path(str(source)).parent / "out"
    config = config_of(source, output, **fields)
    totals = Totals(config, *_work(config))
    totals.check(final=True)
    assert totals.progress().total == totals.done, "progress ends at 100 %"
    result = prepare._commit(config, config.output, read_plan(config, config.output))
    rejected, ignored = (
        {row["key"]: row["reason"] for row in pq.read_table(output / f"{name}.parquet").to_pylist()}
        for name in ("rejected", "ignored")
    )
    assert result.rejected == Counter(rejected.values())
    assert result.ignored == Counter(ignored.values())
    assert result.num_items == result.num_rows + len(rejected)
    return ImageTable.open(result.uri), rejected, ignored


def _work(config) -> tuple:
    summaries = work_off(config)
    return read_plan(config, config.output), summaries


def keys(table: ImageTable) -> list[str]:
    return table.read_rows(0, table.num_rows, ["key"])["key"].to_pylist()


def test_what_systems_leave_beside_pictures_is_ignored(tmp_path: Path) -> None:
    source = tmp_path / "in"
    files = write_folder(source, per_class=2)
    lay(source, {
        ".DS_Store": b"\0\0\0\1Bud1", "ant/.DS_Store": b"\0", "ant/._000.jpg": APPLE_DOUBLE,
        "bee/Thumbs.db": b"\xd0\xcf\x11\xe0", "bee/Desktop.ini": b"[x]", ".git/HEAD": b"ref",
        "__MACOSX/ant/._000.jpg": APPLE_DOUBLE, "@eaDir/000.jpg/SYNOPHOTO.jpg": JPEG,
        ".Trashes/501/000.jpg": JPEG, "cat/Icon\r": b"", "cat/.hidden.jpg": JPEG,
    })  # fmt: skip
    table, rejected, ignored = prepared(source, max_rejected=0)
    assert keys(table) == sorted(files) and rejected == {}
    assert table.class_names == ["ant", "bee", "cat"]
    assert set(ignored) == {
        ".DS_Store", ".git/", ".Trashes/", "@eaDir/", "__MACOSX/", "ant/.DS_Store",
        "ant/._000.jpg", "bee/Thumbs.db", "bee/Desktop.ini", "cat/Icon\r", "cat/.hidden.jpg",
    }  # fmt: skip
    assert set(ignored.values()) == {"hidden"}
    assert table.manifest["ignored"] == {"hidden": 11}
    audit(AuditConfig(table=table.uri))


def test_what_is_no_picture_by_name_and_by_content_is_ignored(tmp_path: Path) -> None:
    source = tmp_path / "in"
    film = b"\0\0\0\x20ftypisom" + bytes(3000)
    lay(source, {
        "a/1.jpg": JPEG, "b/2": encoded(2), "b/3.txt": encoded(3, "PNG"),
        "a/metadata.csv": b"file_name,label\n1.jpg,x\n", "b/labels.txt": b"1 2 3", "b/empty": b"",
        "notes/readme.md": b"# notes", "b/film.mp4": film,
        "a/page.jpg": b"<html>404", "a/empty.png": b"", "a/drawing.svg": b"<svg/>",
        "b/cut": encoded(4, "PNG")[:300], "b/long.jpg": JPEG + bytes(3000),
        "b/long": JPEG + bytes(3000), "features/1.npy": b"\x93NUMPY", "films/1.mp4": film,
    })  # fmt: skip
    os.mkfifo(source / "a/pipe")
    os.mkfifo(source / "a/pipe.jpg")
    (source / "b/back").symlink_to(source)
    (source / "b/gone").symlink_to("nowhere")
    table, rejected, ignored = prepared(source, max_rejected=10, max_image_mb=0.003)
    assert keys(table) == ["a/1.jpg", "b/2", "b/3.txt"]
    assert table.class_names == ["a", "b"], "a folder of notes is no class"
    assert rejected == {
        "a/page.jpg": "not_an_image", "a/empty.png": "empty", "a/drawing.svg": "not_an_image",
        "b/cut": "truncated", "b/long.jpg": "too_large", "b/long": "too_large",
        "a/pipe.jpg": "not_a_file", "b/gone": "missing",
    }  # fmt: skip
    assert ignored == dict.fromkeys(
        [
            "a/metadata.csv", "b/labels.txt", "b/film.mp4", "notes/readme.md", "features/1.npy",
            "films/1.mp4",
        ],
        "not_an_image",
    ) | {"b/empty": "empty", "a/pipe": "not_a_file", "b/back": "symlink_loop"}  # fmt: skip


def test_files_beside_tars_and_in_them(tmp_path: Path) -> None:
    source = lay(tmp_path / "in", {
        "._a.tar": APPLE_DOUBLE, "sizes.json": b"{}", "_index/a.idx": b"0",
        "a.tar": tar_bytes([
            ("._1.jpg", APPLE_DOUBLE), ("1.jpg", JPEG), ("1.cls", b"2"), ("1.mask.png", JPEG),
            ("__MACOSX/._1.jpg", APPLE_DOUBLE), ("README.txt", b"hello"), ("2.cls", b"1"),
            ("metadata.csv", b"1"), ("./3.jpg", JPEG),
        ]),
    })  # fmt: skip
    table, rejected, ignored = prepared(source, max_rejected=1)
    assert keys(table) == ["a.tar/./3.jpg", "a.tar/1.jpg"]
    assert rejected == {"a.tar/2": "no_image"}
    assert ignored == {
        "._a.tar": "hidden", "sizes.json": "other_file", "_index/a.idx": "other_file",
        "a.tar/._1.jpg": "hidden", "a.tar/__MACOSX/._1.jpg": "hidden",
        "a.tar/1.mask.png": "other_image", "a.tar/README": "other_file",
        "a.tar/metadata": "other_file",
    }  # fmt: skip


def test_files_beside_parquet(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("data/a", "data/._b", "_delta_log/0"):
        write_parquet(source / f"{name}.parquet", hf_table([JPEG], [0], ["x"]))
    lay(source, {"README.md": b"#", "_SUCCESS": b"", "data/._c.parquet": APPLE_DOUBLE})
    table, rejected, ignored = prepared(source)
    assert keys(table) == ["data/a.parquet/0000000000"] and rejected == {}
    assert ignored == {
        "README.md": "other_file", "_SUCCESS": "other_file", "_delta_log/": "hidden",
        "data/._b.parquet": "hidden", "data/._c.parquet": "hidden",
    }  # fmt: skip


def test_nothing_but_hidden_files_is_asked_about(tmp_path: Path) -> None:
    source = lay(tmp_path / "in", {".data/1.jpg": JPEG, "._2.jpg": APPLE_DOUBLE})
    with pytest.raises(InputError, match=r"belong to programs \(\._2\.jpg\); give the hidden dir"):
        prepared(source)
    assert keys(prepared(source / ".data")[0]) == ["1.jpg"]


def test_a_hidden_file_that_is_named_is_taken(tmp_path: Path) -> None:
    source = lay(tmp_path / "in", {".1.jpg": JPEG, "2.jpg": JPEG})
    assert [one.ignored for one in open_source(str(source)).entries()] == ["hidden", ""]
    [entry] = open_source(str(source / ".1.jpg")).entries()
    assert (entry.path, entry.ignored) == (".1.jpg", "")


# Git LFS


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_containers_that_were_not_fetched_are_told(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "in"
    if suffix == "parquet":
        write_parquet(source / "a.parquet", hf_table([JPEG] * 9, [0] * 9, ["x"]))
    else:
        lay(source, {"a.tar": tar_bytes([("1.jpg", JPEG)])})
    lay(source, {f"b.{suffix}": POINTER})
    with pytest.raises(InputError, match=rf"b\.{suffix} .*run `git lfs pull`"):
        prepared(source)


def test_pictures_that_were_not_fetched_are_told(tmp_path: Path) -> None:
    files = {f"{number}.png": POINTER for number in range(3)} | {"bare": POINTER, "4.jpg": JPEG}
    source = lay(tmp_path / "in", files)
    with pytest.raises(StageFailed, match=r"3 lfs_pointer[^$]*run `git lfs pull`"):
        prepared(source)
    (source / "4.jpg").unlink()
    config = config_of(source, tmp_path / "none", max_rejected="100%")
    work_off(config)
    with pytest.raises(StageFailed, match=r"ignored: 1 lfs_pointer\n.*run `git lfs pull`"):
        prepare._commit(config, config.output, read_plan(config, config.output))


def test_pointers_inside_tables_are_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_parquet(source / "a.parquet", pa.table({"image": [JPEG, POINTER]}))
    _, rejected, _ = prepared(source, max_rejected=1)
    assert rejected == {"a.parquet/0000000001": "lfs_pointer"}


# Names and heads


@pytest.mark.parametrize("kind", FORMATS)
def test_beginnings_of_pictures_are_recognised(kind: str) -> None:
    assert recognised(encoded(1, kind)[:64])


@pytest.mark.parametrize("head", [b"", b"\0\0\0\x20ftypisom", b"<html>", b"%PDF-1.7", POINTER])
def test_other_beginnings_are_not(head: bytes) -> None:
    assert not recognised(head)


def test_a_table_of_before_opens(tmp_path: Path) -> None:
    """Its manifest says nothing of ignored files or of the sizes of classes."""
    source = tmp_path / "in"
    write_folder(source)
    table, _, _ = prepared(source)
    manifest = {
        name: value
        for name, value in table.manifest.items()
        if name not in ("ignored", "class_counts")
    }
    manifest["options"] = {
        name: value for name, value in manifest["options"].items() if name != "label_level"
    }
    Path(table.uri, "manifest.json").write_text(json.dumps(manifest))
    Path(table.uri, "ignored.parquet").unlink()
    assert ImageTable.open(table.uri).fingerprint == table.fingerprint
    again = prepare.run(config_of(source, table.uri))
    assert again.already_done and again.ignored == {}
    assert "3 classes (by first folder)" in again.summary()
    audit(AuditConfig(table=table.uri))
