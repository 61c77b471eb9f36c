"""Sources: sorted without sorting, told apart, read to the last item."""

import os
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation import sample_images, sources
from pipelines.preparation.globs import Glob
from pipelines.preparation.parquet_source import ParquetPlan
from pipelines.preparation.readers import Item, Reader
from pipelines.preparation.sources import cut, open_source
from pipelines.preparation.walking import Entry, Listings, walk
from tests.pipelines.image_sources import (
    encoded,
    hf_table,
    tar_bytes,
    write_folder,
    write_parquet,
    write_tars,
)
from tests.s3_server import S3Store, bucket, s3  # noqa: F401 - fixtures


def read(source: sources.Source, entries: list[Entry] | None = None, **fields) -> list[Item]:
    options = {"labels": "none", "max_image_bytes": 10**6} | fields
    reader = Reader(root=source.root, format=source.format, **options)
    return list(reader.items(list(source.entries()) if entries is None else entries))


# Walking


def test_a_walk_is_sorted_by_key_without_sorting(tmp_path: Path) -> None:
    """Names around the slash are where a walk by directory name would go wrong."""
    rng = random.Random(0)
    names = {
        "/".join(
            rng.choice(["a", "a-b", "a.b", "a0", "A", "ä", "b c", "日本"]) for _ in range(depth)
        )
        + rng.choice(["", ".png", "-", "/x", "0"])
        for depth in (1, 2, 3)
        for _ in range(60)
    }
    kept = []
    for name in sorted(names):
        path = tmp_path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1")
        except OSError:  # a file is where a directory is needed
            continue
        kept.append(name)
    found = [entry.path for entry in walk(Listings(str(tmp_path)))]
    assert found == sorted(kept)
    assert found == sorted(found, key=str.encode)


def test_containers_are_listed_in_the_order_of_the_keys_inside(tmp_path: Path) -> None:
    names = ["a.tar", "a.tar-1.tar", "a.tar.tar", "b/c.tar"]
    (tmp_path / "b").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    found = [entry.path for entry in walk(Listings(str(tmp_path)), container_suffix=".tar")]
    assert found == sorted(names, key=lambda name: f"{name}/member")
    assert found != sorted(names)


def test_what_is_no_file_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "image.png").write_bytes(b"12345")
    (tmp_path / "dir" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "dir" / "image.png")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (Path(os.fsdecode(bytes(tmp_path) + b"/latin-\xe9.png"))).write_bytes(b"1")
    found = {entry.path: (entry.size, entry.reason) for entry in walk(Listings(str(tmp_path)))}
    assert found == {
        "dir/image.png": (5, ""),
        "dir/loop": (0, "symlink_loop"),
        "gone": (0, "missing"),
        "latin-\\xe9.png": (1, "bad_name"),
        "linked": (5, ""),
        "pipe": (0, "not_a_file"),
    }


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.jpg", ["a.jpg", ".jpg"], ["b/a.jpg", "a.jpeg"]),
        ("**/*.jpg", ["a.jpg", "b/a.jpg", "b/c/a.jpg"], ["a.png"]),
        ("train/**", ["train/a", "train/b/c"], ["test/a"]),
        ("s-[0-3].tar", ["s-2.tar"], ["s-4.tar"]),
        ("s-[!0-3].tar", ["s-4.tar"], ["s-2.tar"]),
        ("s-?.tar", ["s-1.tar"], ["s-10.tar", "s-/.tar"]),
        ("a+(b).*", ["a+(b).x"], ["aab.x"]),
        ("s-{008..010}.tar", ["s-008.tar", "s-010.tar"], ["s-011.tar", "s-8.tar"]),
        ("{8..12}/*", ["8/a", "12/a"], ["08/a", "13/a", "0/a"]),
    ],
)
def test_globs(pattern: str, matches: list[str], others: list[str]) -> None:
    assert [name for name in matches + others if Glob(pattern).matches(name)] == matches


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 500), max_size=60),
    unit_bytes=st.integers(1, 900),
    most=st.integers(1, 10),
)
def test_units_tile_the_listing(sizes: list[int], unit_bytes: int, most: int) -> None:
    entries = [Entry(path=str(i), size=size) for i, size in enumerate(sizes)]
    units = list(cut(entries, unit_bytes, max_entries=most))
    assert [entry for unit in units for entry in unit] == entries
    for unit in units[:-1]:
        assert len(unit) == most or sum(entry.size for entry in unit) >= unit_bytes
    for unit in units:
        assert len(unit) <= most
        assert sum(entry.size for entry in unit[:-1]) < unit_bytes


# Telling apart


def test_formats_are_told_by_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "tree")
    write_tars(tmp_path / "tars")
    (tmp_path / "tars" / "sizes.json").write_text("{}")
    write_parquet(tmp_path / "hf" / "train-0.parquet", hf_table([encoded(1)], [0], ["a"]))
    (tmp_path / "hf" / "README.md").write_text("# a data set")
    for name, expected in [("tree", "folder"), ("tars", "webdataset"), ("hf", "parquet")]:
        assert open_source(str(tmp_path / name)).format == expected
    assert open_source(str(tmp_path / "tars"), "folder").format == "folder"
    assert open_source(str(tmp_path / "tars" / "*.tar")).format == "webdataset"
    assert open_source(str(tmp_path / "tars" / "shard-000.tar")).format == "webdataset"
    listed = [(one.path, one.ignored) for one in open_source(str(tmp_path / "tars")).entries()]
    tars = [(f"shard-{number:03d}.tar", "") for number in range(3)]
    assert listed == [*tars, ("sizes.json", "other_file")]
    one = open_source(str(tmp_path / "tree" / "bee" / "001.jpg"))
    assert [entry.path for entry in one.entries()] == ["001.jpg"]
    chosen = open_source(str(tmp_path / "tree" / "*" / "00[12].jpg"))
    assert [entry.path for entry in chosen.entries()][:3] == [
        "ant/001.jpg",
        "ant/002.jpg",
        "bee/001.jpg",
    ]


def test_brackets_in_a_real_name_are_no_glob(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos [2020]")
    assert len(list(open_source(str(tmp_path / "photos [2020]")).entries())) == 15


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"")
    write_tars(tmp_path / "beside")
    (tmp_path / "beside" / "more.tgz").write_bytes(b"")
    for uri, message in [
        (str(tmp_path / "beside"), "more.tgz is compressed; unpack"),
        (str(tmp_path / "nowhere"), "no such file or folder"),
        (str(tmp_path / "[z-a].jpg"), "is no glob"),
        (str(tmp_path / "empty"), "no files there"),
        (str(tmp_path / "packed"), "unpack"),
        ("sample:cats", "the only sample is 'sample:emoji'"),
    ]:
        with pytest.raises(InputError, match=message):
            open_source(uri)
    with pytest.raises(InputError, match=r"no \*\.parquet files"):
        open_source(str(tmp_path / "beside" / "*.tar"), "parquet")
    with pytest.raises(InputError, match=r"more\.tgz is compressed"):
        list(open_source(str(tmp_path / "beside"), "webdataset").entries())


# Reading


def test_a_folder_is_read_with_labels_and_groups(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "tree")
    (tmp_path / "tree" / "loose.jpg").write_bytes(encoded(7))
    (tmp_path / "tree" / "huge.jpg").write_bytes(bytes(2000))
    items = read(
        open_source(str(tmp_path / "tree")),
        labels="folder",
        class_names=("ant", "bee", "cat"),
        group_pattern=r"/(\d\d)\d\.",
        max_image_bytes=1900,
    )
    assert [item.key for item in items] == [*sorted(files), "huge.jpg", "loose.jpg"]
    assert [item.label for item in items] == [0] * 5 + [1] * 5 + [2] * 5 + [None] * 2
    assert {item.group for item in items} == {"00", None}
    assert all(item.data == files[item.key] for item in items if item.key in files)
    assert items[-2].reason == "too_large" and not items[-2].data


def test_files_that_go_away_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "tree")
    source = open_source(str(tmp_path / "tree"))
    entries = list(source.entries())
    (tmp_path / "tree" / "bee" / "002.jpg").unlink()
    items = read(source, entries)
    assert len(items) == 15
    assert [item.key for item in items if item.reason == "missing"] == ["bee/002.jpg"]


def test_tars_are_read_sorted_with_labels(tmp_path: Path) -> None:
    rows = write_tars(tmp_path)
    source = open_source(str(tmp_path))
    items = read(source, labels="field")
    assert {item.key: (item.data, item.label) for item in items} == rows
    assert [item.key for item in items] == sorted(rows)
    assert [item.label for item in read(source)] == [None] * len(rows)
    by_json = read(source, labels="field", label_field="json:kind")
    assert [item.label for item in by_json] == [rows[item.key][1] + 1 for item in by_json]
    wrong = read(source, labels="field", label_field="json:caption")
    assert {item.reason for item in wrong} == {"bad_label"}


def test_every_member_of_a_tar_is_accounted_for(tmp_path: Path) -> None:
    good = encoded(1)
    members = [
        ("b.jpg", good),
        ("a.jpg", good),
        ("b.jpg", encoded(2)),
        ("README", b"hello"),
        ("lonely.cls", b"3"),
        ("two.jpg", good),
        ("two.seg.png", encoded(3, "PNG")),
        ("x/c.jpg", good),
        ("x/c.cls", b"seven"),
    ]
    (tmp_path / "odd.tar").write_bytes(tar_bytes(members))
    items = read(open_source(str(tmp_path)), labels="field")
    assert [(item.key, item.reason) for item in items] == [
        ("odd.tar/README", "other_file"),
        ("odd.tar/a.jpg", ""),
        ("odd.tar/b.jpg", ""),
        ("odd.tar/b.jpg", ""),
        ("odd.tar/lonely", "no_image"),
        ("odd.tar/two.jpg", ""),
        ("odd.tar/two.seg.png", "other_image"),
        ("odd.tar/x/c.jpg", "bad_label"),
    ]
    assert [item.data for item in items if item.key.endswith("b.jpg")] == [good, encoded(2)]


def sparse_tar(*, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """`1.ppm` with holes as GNU tar keeps it, then another file."""
    info = tarfile.TarInfo("1.ppm")
    data = b"".join(piece for _, piece in pieces)
    info.size, info.type = len(data), tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for number, (begin, piece) in enumerate(pieces):
        header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (begin, len(piece))
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    rest = tar_bytes([("2.png", encoded(1, "PNG"))])
    return bytes(header) + data + bytes(-len(data) % 512) + rest


def test_files_with_holes_are_read_whole(tmp_path: Path) -> None:
    whole = b"P6 100 100 255\n" + bytes(20_000) + bytes(range(100)) * 100
    pieces = [(0, whole[:512]), (19_968, whole[19_968:])]
    for name, found in {
        "good": pieces,
        "beyond": [pieces[0], (20_480, pieces[1][1])],
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(sparse_tar(pieces=found, size=len(whole)))
    items = {item.key: item for item in read(open_source(str(tmp_path)))}
    assert items["good.tar/1.ppm"].data == whole
    assert items["beyond.tar/1.ppm"].reason == "truncated"
    assert [items[f"{name}.tar/2.png"].reason for name in ("good", "beyond")] == ["", ""]


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "broken header", "text"])
def test_damaged_tars_are_told(tmp_path: Path, damage: str) -> None:
    data = bytearray(tar_bytes([(f"{i}.jpg", encoded(i, height=40)) for i in range(8)]))
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    if damage == "cut in a member":
        data = data[: headers[5] + 512 + 100]
    elif damage == "cut in a header":
        data = data[: headers[5] + 200]
    elif damage == "broken header":
        data[headers[5]] ^= 255
    else:
        data = bytearray(b"this is no tar" * 100)
    (tmp_path / "bad.tar").write_bytes(data)
    items = read(open_source(str(tmp_path)))
    whole = 0 if damage == "text" else 5
    assert sum(not item.reason for item in items) == whole
    assert ("bad.tar", "bad_tar") in [(item.key, item.reason) for item in items]


def plan_parquet(source: sources.Source, **options) -> tuple[Reader, list[Entry], int]:
    config = PrepareConfig(source=source.uri, output="unused", **options)
    plan = ParquetPlan(config, source)
    reader = Reader(root=source.root, format="parquet", labels="none", max_image_bytes=10**6)
    entries = list(plan.entries())
    return plan.with_columns(reader), entries, plan.num_items


def test_hugging_face_parquet(tmp_path: Path) -> None:
    images = [encoded(i) for i in range(10)]
    labels = [i % 3 for i in range(8)] + [-1, None]
    write_parquet(tmp_path / "a.parquet", hf_table(images, labels, ["x", "y", "z"]))
    write_parquet(tmp_path / "b.parquet", hf_table([None, b"text"], [5, 0], ["x", "y", "z"]))
    reader, entries, num_items = plan_parquet(open_source(str(tmp_path)))
    assert reader.class_names == ("x", "y", "z") and reader.labels == "field"
    assert num_items == 12 and len(entries) == 4
    items = list(reader.items(entries))
    assert [item.key for item in items] == [
        *(f"a.parquet/{i:010d}" for i in range(10)),
        "b.parquet/0000000000",
        "b.parquet/0000000001",
    ]
    assert [item.data for item in items[:10]] == images
    assert [item.label for item in items[:10]] == [0, 1, 2, 0, 1, 2, 0, 1, None, None]
    assert [item.reason for item in items[10:]] == ["no_image", ""]
    assert list(reader.items(entries[1:3])) == items[4:10]


def test_parquet_columns_by_name(tmp_path: Path) -> None:
    names = ["d", "b", "a", "b", "c", None]
    table = pa.table(
        {
            "thumb": pa.array([b"1"] * 6, pa.binary()),
            "photo": pa.array([encoded(i) for i in range(6)], pa.large_binary()),
            "name": names,
            "kind": ["red", "blue", "red", None, "red", "blue"],
            "who": [1, 1, 2, 2, 3, 3],
        }
    )
    write_parquet(tmp_path / "t.parquet", table, rows_per_group=2)
    source = open_source(str(tmp_path))
    options = {
        "image_field": "photo",
        "key_field": "name",
        "label_field": "kind",
        "group_field": "who",
    }
    reader, entries, _ = plan_parquet(source, **options)
    assert reader.class_names == ("blue", "red")
    items = list(reader.items(entries))
    assert [(item.key, item.label, item.group, item.reason) for item in items] == [
        ("t.parquet/0000000005", None, None, "no_key"),
        ("t.parquet/a", 1, "2", ""),
        ("t.parquet/b", 0, "1", ""),
        ("t.parquet/b", None, "2", ""),
        ("t.parquet/c", 1, "3", ""),
        ("t.parquet/d", 1, "1", ""),
    ]
    for field, message in [
        ({"image_field": ""}, "name the one with the images"),
        ({"image_field": "who"}, "give a column of bytes"),
        ({"label_field": "colour"}, "no such column"),
        (
            {"label_field": "photo"},
            "is large_binary in t.parquet; name a column of whole.*labels = .none.",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            plan_parquet(source, **(options | field))


def test_damaged_parquet_is_accounted_for_row_by_row(tmp_path: Path) -> None:
    images = [encoded(i) for i in range(12)]
    write_parquet(tmp_path / "a.parquet", hf_table(images, [0] * 12, ["x"]))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    page = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    data[page : page + 30] = bytes(30)
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    reader, entries, num_items = plan_parquet(open_source(str(tmp_path)))
    items = list(reader.items(entries))
    assert num_items == len(items) == 13
    assert len({item.key for item in items}) == 13
    by_reason = {item.key: item.reason for item in items}
    assert by_reason["b.parquet"] == "bad_parquet"
    rows = [by_reason[f"a.parquet/{i:010d}"] for i in range(12)]
    assert rows == [""] * 4 + ["bad_parquet"] * 4 + [""] * 4


def test_the_sample_is_labelled_and_grouped() -> None:
    source = open_source("sample:emoji")
    entries = list(source.entries())
    assert len(entries) == 4009
    assert [entry.path for entry in entries] == sorted(entry.path for entry in entries)
    classes = tuple(sorted({entry.path.partition("/")[0] for entry in entries} - {"Other"}))
    assert len(classes) == 9
    few = entries[:: len(entries) // 40]
    items = read(source, few, labels="folder", class_names=classes)
    assert all(item.data.startswith(b"\x89PNG") for item in items)
    assert items == read(source, few, labels="folder", class_names=classes)
    assert all((item.label is None) == item.key.startswith("Other/") for item in items)
    for tone in ("", "-1f3fb", "-1f3ff"):
        assert sample_images.group_of(f"People & Body/1f44b{tone}.png") == "1f44b"
    woman = sample_images.group_of("People & Body/1f469-1f3fd-200d-1f680.png")
    assert woman == sample_images.group_of("People & Body/1f9d1-200d-1f680.png")
    assert woman != sample_images.group_of("People & Body/1f9d1-200d-1f692.png")


def test_a_store_is_read_like_a_disk(tmp_path: Path, s3: S3Store, bucket: str) -> None:  # noqa: F811
    write_folder(tmp_path / "tree" / "folder", classes=("a", "a-b", "a.b"))
    write_tars(tmp_path / "tree" / "tars")
    write_parquet(tmp_path / "tree/hf/x.parquet", hf_table([encoded(1), b"?"], [0, 1], ["a", "b"]))
    storage.store_dir(tmp_path / "tree", s3.uri(bucket, "data"))
    for name in ("folder", "tars", "hf", "folder/a*/**", "tars/shard-00[12].tar"):
        here = open_source(str(tmp_path / "tree" / name))
        there = open_source(s3.uri(bucket, "data", name))
        assert there.format == here.format
        assert list(there.entries()) == list(here.entries())
        if here.format == "parquet":
            reader, entries, _ = plan_parquet(there)
            assert list(reader.items(entries)) == list(plan_parquet(here)[0].items(entries))
        else:
            assert read(there) == read(here)
    with pytest.raises(InputError, match="no files there"):
        open_source(s3.uri(bucket, "elsewhere"))
