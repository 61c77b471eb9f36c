"""A label is right or it is refused: tars, Parquet files and folders that could be read wrongly."""

import json
import tarfile
import tempfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation import labels
from pipelines.preparation.parquet_source import ParquetPlan
from pipelines.preparation.readers import Item, Reader
from pipelines.preparation.source_plan import SourcePlan, make_plan, read_listing
from pipelines.preparation.sources import look_like_parts, open_source
from pipelines.preparation.walking import Entry
from tests.pipelines.image_sources import encoded, hf_table, tar_bytes, write_parquet
from tests.pipelines.prepare_fixtures import config_of

PNG = encoded(1, "PNG")


def items(plan: SourcePlan, config: PrepareConfig) -> list[Item]:
    """All items of a plan, unit after unit."""
    return [
        item
        for unit, listing in enumerate(plan.listings)
        for item in plan.reader.items(read_listing(config.output, unit, listing))
    ]


def named(source: Path, **fields) -> dict[str, str | None]:
    """Class names (or the reason for none) by key."""
    config = config_of(source, Path(tempfile.mkdtemp(dir=source.parent)), **fields)
    plan = make_plan(config, config.output)
    names = plan.reader.class_names
    return {
        item.key: item.reason
        or (None if item.label is None else names[item.label] if names else str(item.label))
        for item in items(plan, config)
        if not item.ignored
    }


# Tars


def tar_of(tmp_path: Path, names: dict[str, bytes | str]) -> Path:
    source = tmp_path / "in"
    source.mkdir(exist_ok=True)
    members = [
        (name, data.encode() if isinstance(data, str) else data) for name, data in names.items()
    ]
    (source / "a.tar").write_bytes(tar_bytes(members))
    return source


@pytest.mark.parametrize(
    ("members", "fields", "expected"),
    [
        # Names with dots: each image has the label of its own name.
        ({"22.05.cls": "1", "22.05.png": PNG, "22.06.cls": "2", "22.06.png": PNG},
         {}, {"22.05.png": "1", "22.06.png": "2"}),
        ({"22.05.json": '{"n": 1}', "22.05.png": PNG, "22.06.json": '{"n": 0}', "22.06.png": PNG},
         {"label_field": "json:n"}, {"22.05.png": "1", "22.06.png": "0"}),
        ({"v1.2/7.5.png": PNG, "v1.2/7.5.cls": "3"}, {}, {"v1.2/7.5.png": "3"}),
        ({"22.05.png": PNG, "22.05.txt": "a", "22.06.png": PNG, "22.06.txt": "b"},
         {}, {"22.05.png": None, "22.06.png": None}),
        # A photograph with pictures that say something about it.
        ({"7.jpg": PNG, "7.mask.png": PNG, "7.depth.png": PNG, "7.cls": "4"}, {}, {"7.jpg": "4"}),
        ({"7.rgb.png": PNG, "7.depth.png": PNG, "7.cls": "4"},
         {"image_field": "rgb.png"}, {"7.rgb.png": "4"}),
        ({"7.jpg": PNG, "7.png": PNG, "7.cls": "4"}, {"image_field": "PNG"}, {"7.png": "4"}),
        ({"7.webp": PNG, "7.png": PNG, "8.png": PNG, "8.cls": "2"},
         {"image_field": "webp;png"}, {"7.webp": None, "8.png": "2"}),
        ({"22.05.png": PNG, "22.06.png": PNG, "22.06.cls": "2", "22.05.cls": "1"},
         {"image_field": "*.png"}, {"22.05.png": "1", "22.06.png": "2"}),
        ({"22.png": PNG, "22.cls": "2", "22.1.png": PNG, "22.1.cls": "1"},
         {}, {"22.png": "2", "22.1.png": "1"}),
        ({"7.jpg": PNG, "7.json": "{}", "7.mask.png": PNG, "7.mask.json": "{}"},
         {}, {"7.jpg": None}),
        # The label behind a further word is named in full.
        ({"7.image.jpg": PNG, "7.label.cls": "4"},
         {"label_field": "label.cls"}, {"7.image.jpg": "4"}),
        ({"./7.jpg": PNG, "7.cls": "4"}, {}, {"./7.jpg": "4"}),
        ({"7.jpg": PNG, "7.cls": "4", "7.CLS": "4"}, {}, {"7.jpg": "4"}),
    ],
)  # fmt: skip
def test_samples_of_tars(tmp_path: Path, members, fields, expected) -> None:
    found = named(tar_of(tmp_path, members), **fields)
    assert found == {f"a.tar/{name}": label for name, label in expected.items()}


def test_a_label_that_claims_more_than_there_is_memory_is_none(tmp_path: Path) -> None:
    source = tar_of(tmp_path, {"7.png": PNG})
    header = tarfile.TarInfo("7.cls")
    header.size = 2**45
    whole = (source / "a.tar").read_bytes()
    end = 512 * (1 + -(-len(PNG) // 512))
    (source / "a.tar").write_bytes(whole[:end] + header.tobuf() + b"1".ljust(512, b"\0"))
    assert named(source, labels="field")["a.tar/7.png"] == "bad_label"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"7.jpg": PNG, "7.png": PNG}, r"sample '7' .*of 7\.jpg, 7\.png.*which is the image"),
        ({"7.rgb.png": PNG, "7.depth.png": PNG}, r"--image_field \(jpg, or rgb\.png\)"),
        ({"22.05.png": PNG, "22.06.png": PNG, "22.05.cls": "1"}, r"give --image_field '\*\.png'"),
        ({"22.06.png": PNG, "22.05.cls": "1"}, r"22\.06\.png, 22\.05\.cls.*which is whose label"),
        ({"7.image.jpg": PNG, "7.label.cls": "4"}, r"--label_field \(label\.cls\)"),
        ({"7.jpg": PNG, "7.cls": "4", "7.CLS": "5"}, "which is whose label"),
    ],
)
def test_samples_that_can_be_read_in_two_ways_are_asked_about(tmp_path, members, message) -> None:
    source = tar_of(tmp_path, members)
    with pytest.raises(InputError, match=message):
        named(source)


def test_one_unclear_sample_among_many_is_rejected(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for number in range(30):
        members |= {f"{number:02d}.png": PNG, f"{number:02d}.cls": str(number)}
    members |= {"30.png": PNG, "30.cls": "7", "30.CLS": "8"}
    found = named(tar_of(tmp_path, members))
    assert found.pop("a.tar/30.png") == "unclear_label"
    assert found == {f"a.tar/{number:02d}.png": str(number) for number in range(30)}


def test_a_sample_that_the_head_cuts_is_not_asked_about(tmp_path: Path, monkeypatch) -> None:
    """What is missing of it may lie behind."""
    monkeypatch.setattr("pipelines.preparation.first_samples.HEAD_BYTES", 4096)
    members = {"22.05.png": PNG, "22.06.png": PNG, "22.05.cls": "1", "22.06.cls": "2"}
    found = named(tar_of(tmp_path, members))
    assert found == {"a.tar/22.05.png": "1", "a.tar/22.06.png": "2"}


@pytest.mark.parametrize(
    ("label", "fields", "expected"),
    [
        (("a.CLS", b"3"), {}, (3, "")),
        (("a.json", b'{"n": 4}'), {"label_field": "JSON:n"}, (4, "")),
        (("a.txt", b"3"), {}, (None, "")),
        (("a.txt", b"3"), {"label_required": True}, (None, "bad_label")),
        (("a.cls", b"3000000"), {}, (None, "bad_label")),
        (("a.json", b"[" * 100_000), {"label_field": "json:n"}, (None, "bad_label")),
        (("a.json", b'{"n": 1, "n": 2}'), {"label_field": "json:n"}, (None, "bad_label")),
        (("a.json", b'{"n": 2.0}'), {"label_field": "json:n"}, (2, "")),
        (("a.json", b'{"n": null}'), {"label_field": "json:n"}, (None, "")),
        (("a.json", b'{"n": 2.5}'), {"label_field": "json:n"}, (None, "bad_label")),
        (("a.cls", b"1_0"), {}, (None, "bad_label")),
        (("a.cls", b"\xef\xbb\xbf3\n"), {}, (3, "")),
        (("a.cls", b"-1"), {}, (None, "")),
    ],
)
def test_labels_of_tars(tmp_path: Path, label, fields, expected) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.jpg", encoded(1)), label]))
    options = {"labels": "field", "max_image_bytes": 10**6} | fields
    reader = Reader(root=str(tmp_path), format="webdataset", **options)
    items = list(reader.items([Entry(path="a.tar", size=5)]))
    assert [(item.label, item.reason) for item in items] == [expected]


# Parquet


def planned(root: Path, **options) -> tuple[Reader, list[Entry]]:
    source = open_source(str(root))
    plan = ParquetPlan(PrepareConfig(source=source.uri, output="unused", **options), source)
    reader = Reader(root=source.root, format="parquet", labels="none", max_image_bytes=10**6)
    entries = list(plan.entries())
    return plan.with_columns(reader), entries


def parquet(path: Path, values, kind=None, *, names=None) -> None:
    """A Parquet file with these labels and, if any, `datasets`' names of them."""
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    table = pa.table({"image": [encoded(i) for i in range(len(array))], "label": array})
    if names is not None:
        described = {"label": {"names": names, "_type": "ClassLabel"}}
        meta = json.dumps({"info": {"features": described}})
        table = table.replace_schema_metadata({"huggingface": meta})
    write_parquet(path, table)


def classes(root: Path, **options) -> list[str | None]:
    """Class names, or reasons for none, in the order of the rows."""
    reader, entries = planned(root, **options)
    names = reader.class_names
    return [
        item.reason
        or (None if item.label is None else names[item.label] if names else str(item.label))
        for item in reader.items(entries)
    ]


def test_names_of_files_are_brought_together(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [0, 1, 2], names=["cat", "dog", "owl"])
    parquet(tmp_path / "b.parquet", [0, 1, 2, None, -1, 3], names=["dog", "cat", "owl"])
    parquet(tmp_path / "c.parquet", [0, 1], names=["yak", "dog"])
    parquet(tmp_path / "d.parquet", ["dog", "ant", None])
    parquet(tmp_path / "e.parquet", [1, 0], names={"1": "cat", "0": "ant"})
    parquet(tmp_path / "f.parquet", [None], pa.null())
    reader, _ = planned(tmp_path)
    assert reader.class_names == ("cat", "dog", "owl", "yak", "ant")
    assert classes(tmp_path) == [
        *("cat", "dog", "owl"),
        *("dog", "cat", "owl", None, None, "bad_label"),
        *("yak", "dog"),
        *("dog", "ant", None),
        *("cat", "ant"),
        None,
    ]


def test_names_with_a_key_column_are_those_of_the_file(tmp_path: Path) -> None:
    for name, names in [("a", ["cat", "dog"]), ("b", ["dog", "cat"])]:
        table = hf_table([encoded(1), encoded(2)], [0, 1], names)
        write_parquet(tmp_path / f"{name}.parquet", table.append_column("id", [["y", "x"]]))
    assert classes(tmp_path, key_field="id") == ["dog", "cat", "cat", "dog"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"values": [0, 1]}, r"a\.parquet names its classes, b\.parquet has numbers without names"),
        ({"values": [0.5]}, "numbers without names"),
        ({"values": [0], "names": ["cat", "cat"]}, "two classes are called 'cat'"),
        ({"values": [[0]]}, r"is list<.*> in b\.parquet; name a column of whole.*labels = 'none'"),
        ({"values": [b"cat"]}, r"is binary in b\.parquet"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(tmp_path: Path, others, message) -> None:
    parquet(tmp_path / "a.parquet", [0, 1], names=["cat", "dog"])
    parquet(tmp_path / "b.parquet", **others)
    with pytest.raises(InputError, match=message):
        planned(tmp_path)
    assert planned(tmp_path, labels="none")[0].labels == "none"


def test_a_column_in_some_of_the_files_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"image": [PNG]}))
    assert classes(tmp_path) == [None]
    parquet(tmp_path / "b.parquet", ["x"])
    with pytest.raises(InputError, match=r"b\.parquet has a column 'label', other files have none"):
        planned(tmp_path)


def test_of_two_columns_of_one_name_none_is_taken(tmp_path: Path) -> None:
    columns = [pa.array([PNG]), pa.array([1]), pa.array([2])]
    table = pa.table(columns, names=["image", "label", "label"])
    write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(InputError, match="several columns of that name"):
        planned(tmp_path)


class _Tag(pa.ExtensionType):
    """Texts of a writer that has a type of its own for them."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.tag")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


TEXTS = ["b", None, "a"]
NUMBERS = [1, None, 0]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        *((pa.array(TEXTS, kind), TEXTS)
          for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.json_())),
        (pa.array(TEXTS).dictionary_encode(), TEXTS),
        (pa.array(TEXTS, pa.large_string()).dictionary_encode(), TEXTS),
        (pa.ExtensionArray.from_storage(_Tag(), pa.array(TEXTS)), TEXTS),
        *((pa.array(NUMBERS, kind), ["1", None, "0"])
          for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.float16(),
                       pa.decimal128(9, 0), pa.decimal128(9, 2), pa.bool8())),
        (pa.array(NUMBERS).dictionary_encode(), ["1", None, "0"]),
        (pa.array([True, None, False]), ["1", None, "0"]),
        (pa.array([1.5, float("nan"), float("inf"), 2.0]), ["bad_label", None, "bad_label", "2"]),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), ["bad_label", "2"]),
    ],
)  # fmt: skip
def test_labels_in_every_form_that_writers_leave(tmp_path: Path, array, expected) -> None:
    parquet(tmp_path / "a.parquet", array)
    assert classes(tmp_path) == expected


def test_names_are_one_however_their_accents_are_written(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["caf\u00e9", "b", "cafe\u0301"])
    parquet(tmp_path / "b.parquet", [0, 1], names=["b", "cafe\u0301"])
    assert classes(tmp_path) == ["caf\u00e9", "b", "caf\u00e9", "b", "caf\u00e9"]
    parquet(tmp_path / "c.parquet", [0, 1], names=["caf\u00e9", "cafe\u0301"])
    with pytest.raises(InputError, match="two classes are called"):
        planned(tmp_path)


def test_an_empty_text_is_no_name(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["x", "", None])
    assert planned(tmp_path)[0].class_names == ("x",)
    assert classes(tmp_path) == ["x", "bad_label", None]


def test_a_column_of_nothing_is_no_column_of_labels(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [None], pa.null())
    with pytest.raises(InputError, match=r"label_field = 'label': is null.*labels = 'none'"):
        planned(tmp_path)
    assert planned(tmp_path, labels="none")[0].labels == "none"


def test_text_labels_are_bounded_and_in_every_file(tmp_path: Path, monkeypatch) -> None:
    image = [encoded(1)] * 3
    write_parquet(tmp_path / "a.parquet", pa.table({"image": image, "label": ["x", "y", "z"]}))
    assert planned(tmp_path)[0].class_names == ("x", "y", "z")
    with monkeypatch.context() as patched:
        patched.setattr(labels, "MAX_CLASSES", 2)
        with pytest.raises(InputError, match=r"more than 2 different texts.*labels = 'none'"):
            planned(tmp_path)
    write_parquet(tmp_path / "b.parquet", pa.table({"image": image}))
    with pytest.raises(InputError, match=r"b\.parquet has no such column"):
        planned(tmp_path)


def test_a_wild_number_is_no_class(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(1)] * 2, "label": [1, 3_000_000]})
    write_parquet(tmp_path / "a.parquet", table)
    reader, entries = planned(tmp_path)
    assert [(item.label, item.reason) for item in reader.items(entries)] == [
        (1, ""),
        (None, "bad_label"),
    ]


# Folders


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    return root


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ("train val", True),
        ("Train test meta", True),
        ("train2017 val2017", True),
        ("train_images test_images", True),
        ("imagenet_train imagenet_val", True),
        ("train", True),
        ("extra unlabeled", True),
        ("fold0 fold1", True),
        ("split_0 split_1 split_2", True),
        ("images masks", True),
        ("JPEGImages SegmentationClass", True),
        ("rgb depth", True),
        ("images train", True),
        ("cat_images dog_images", False),
        ("mask no_mask", False),
        ("mask train picture", False),
        ("photo sketch cartoon", False),
        ("0 1 2", False),
        ("car train boat", False),
        ("bullet_train freight_train boat", False),
        ("training_day valley testament", False),
        ("cat dog", False),
        ("", False),
    ],
)
def test_folders_that_look_like_parts(folders: str, parts: bool) -> None:
    assert look_like_parts(folders.split()) == parts


def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path: Path) -> None:
    source = tree(
        tmp_path / "in", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/4.png"
    )
    with pytest.raises(InputError, match=r"like parts of a data set.*train, val.*--label_level 2"):
        named(source)
    keys = ["train/cat/1.png", "train/dog/2.png", "val/4.png", "val/cat/3.png"]
    assert named(source, label_level=2) == dict(zip(keys, ["cat", "dog", None, "cat"], strict=True))
    assert named(source, labels="none") == dict.fromkeys(keys)
    taken = named(source, labels="folder")
    assert taken == dict(zip(keys, ["train", "train", "val", "val"], strict=True))
    assert named(source / "train") == {"cat/1.png": "cat", "dog/2.png": "dog"}


def test_the_class_is_the_folder_at_its_level_however_deep_the_file(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "ant/1.png", "ant/x/y/2.png", "bee/x/3.png", "4.png")
    assert list(named(source).values()) == [None, "ant", "ant", "bee"]
    with pytest.raises(InputError, match="label_level = 0: must be at least 1"):
        named(source, label_level=0)
    with pytest.raises(InputError, match="no folders 4 below"):
        named(source, label_level=4, labels="folder")


def test_both_ways_to_write_an_accent_are_one_class(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "caf\u00e9/1.png", "cafe\u0301/2.png", "bar/3.png")
    assert sorted(named(source).values()) == ["bar", "caf\u00e9", "caf\u00e9"]
