"""What a source is taken for, what of it is listed, and what names a class."""

import os
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError
from pipelines.preparation import sources, walking
from pipelines.preparation.globs import exactly
from pipelines.preparation.source_plan import _check_apart, make_plan, read_listing
from pipelines.preparation.sources import class_folders, open_source
from pipelines.preparation.walking import Entry, Listings, walk
from tests.pipelines.image_sources import write_folder


def touch(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    return str(root)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([".cache/huggingface/a.parquet.metadata", "data/a.parquet", "README.md"], "parquet"),
        (["_metadata", "_SUCCESS", "a.parquet", "script.py"], "parquet"),
        ([".git/HEAD", ".git/objects/ab", "shards/a.tar"], "webdataset"),
        (["00000.tar", "00000.parquet", "00000_stats.json"], "webdataset"),
        (["a.tar", "sizes.TXT"], "webdataset"),
        (["a.jpg", "metadata.csv"], "folder"),
        (["nameless", "notes.txt"], "folder"),
        (["_all/a.jpg", "_all/b.jpg"], "folder"),
    ],
)
def test_programs_own_files_do_not_decide_the_format(tmp_path, monkeypatch, names, told):
    monkeypatch.setattr(sources, "PEEK", 3)
    own = [f".cache/{number}" for number in range(5)] if told != "folder" else []
    assert open_source(touch(tmp_path, *names, *own)).format == told


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.parquet", "b.jpg"], "a.parquet beside b.jpg; set --format"),
        (["a.tar", "nameless"], "a.tar beside nameless; set --format"),
        (["a.tar.gz", "b.jpg"], "a.tar.gz beside b.jpg; set --format"),
        (["a.parquet", "b.tar.zst"], "b.tar.zst is compressed; unpack"),
    ],
)
def test_mixtures_are_for_the_user_to_decide(tmp_path, names, message):
    source = touch(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        open_source(source)
    entries = list(open_source(source, "folder").entries())
    assert [entry.ignored for entry in entries] == ["", ""]


def test_what_only_a_program_put_there_is_no_class(tmp_path):
    write_folder(tmp_path / "in")
    touch(tmp_path / "in", ".git/HEAD", "__MACOSX/a", "@eaDir/b", "_odd/c.jpg", "top.jpg")
    config = PrepareConfig(source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    plan = make_plan(config, config.output)
    assert plan.reader.class_names == ("_odd", "ant", "bee", "cat")
    entries = read_listing(config.output, 0, plan.listings[0])
    ignored = [entry.path for entry in entries if entry.ignored]
    assert ignored == [".git/", "@eaDir/", "__MACOSX/"] and len(entries) == 20


def test_folders_without_end_are_no_classes(monkeypatch):
    monkeypatch.setattr(sources, "MAX_CLASSES", 2)
    entries = [Entry(path=f"{number}/a.jpg", size=1) for number in range(3)]
    assert len(list(class_folders(entries[:2], set()))) == 2
    with pytest.raises(InputError, match="labels = 'none'"):
        list(class_folders(entries, set()))


@pytest.mark.parametrize(
    ("pattern", "listed"),
    [
        ("*.tar", {"."}),
        ("*/x/*.tar", {".", "a", "a/x", "b", "b/x", "other"}),
        ("a/**/*.tar", {"a", "a/x", "a/y", "a/x/deep"}),
        ("[ab]/?/*.tar", {".", "a", "a/x", "a/y", "b", "b/x"}),
    ],
)
def test_a_glob_lists_no_directory_that_cannot_match(tmp_path, monkeypatch, pattern, listed):
    names = ["0.tar", "a/1.tar", "a/x/2.tar", "a/y/3.tar", "a/x/deep/4.tar", "b/x/5.tar"]
    root = touch(tmp_path, *names, "other/6.tar")
    seen = set()
    list_dir = walking._list_local

    def noted(root, path):
        seen.add(str(Path(root, path).relative_to(tmp_path)))
        return list_dir(root, path)

    monkeypatch.setattr(walking, "_list_local", noted)
    source = open_source(f"{root}/{pattern}")
    found = {storage.join(source.root, entry.path) for entry in source.entries()}
    assert found == {str(path) for path in tmp_path.glob(pattern)}
    assert seen == listed


def test_a_file_is_meant_whatever_its_name(tmp_path):
    names = ["a[b]*?{1..2}^!.jpg", "a**.jpg", "]["]
    root = touch(tmp_path, *names, "ab.jpg", "a.jpg")
    for name in names:
        assert exactly(name).matches(name)
        assert [entry.path for entry in open_source(f"{root}/{name}").entries()] == [name]


def test_links_that_lead_to_each_other_are_followed_once(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/x").symlink_to("../b")
    (tmp_path / "b/y").symlink_to("../a")
    found = [(entry.path, entry.reason) for entry in walk(Listings(str(tmp_path)))]
    assert found == [
        ("a/1.jpg", ""),
        ("a/x/2.jpg", ""),
        ("a/x/y", "symlink_loop"),
        ("b/2.jpg", ""),
        ("b/y/1.jpg", ""),
        ("b/y/x", "symlink_loop"),
    ]


def test_a_directory_whose_name_is_no_text_is_refused(tmp_path):
    touch(tmp_path, "good/a.jpg")
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9")).mkdir()
    with pytest.raises(InputError, match=r"directory caf\\xe9 is no UTF-8 text.*rename it"):
        open_source(str(tmp_path))
    assert open_source(f"{tmp_path}/good/*").format == "folder"


def test_what_the_first_look_listed_is_not_listed_again(tmp_path, monkeypatch):
    write_folder(tmp_path)
    calls = []
    list_dir = walking._list_local
    monkeypatch.setattr(
        walking, "_list_local", lambda *args: calls.append(args[1]) or list_dir(*args)
    )
    assert len(list(open_source(str(tmp_path)).entries())) == 15
    assert sorted(calls) == ["", "ant/", "bee/", "cat/"]


@pytest.mark.parametrize(
    ("source", "output", "inside"),
    [
        ("a.tar", "out", False),
        ("a.tar", "", False),
        ("*.tar", "out", False),
        ("*.tar", "", False),
        ("a/*.jpg", "a/out", False),
        ("a/*.jpg", "out", False),
        ("*/b.jpg", "out", True),
        ("**/*.jpg", "out", True),
        ("**/*.jpg", "a/out", True),
        ("a/**/*.jpg", "out", False),
        ("a/*", "a", True),
        ("", "out", True),
        ("a", "a/b/out", True),
        ("a", "out", False),
        ("a", "ab", False),
        ("x.parquet", "out", False),
        ("x.parquet", "", True),
        ("*.parquet", "", True),
    ],
)
def test_an_output_is_refused_where_the_source_could_list_it(tmp_path, source, output, inside):
    root = touch(tmp_path / "in", "a.tar", "a/1.jpg", "a/b/2.jpg", "c/b.jpg", "x.parquet")
    told = next((name for name in ("tar", "parquet") if source.endswith(name)), "folder")
    formats = {"tar": "webdataset"}
    opened = open_source(f"{root}/{source}".rstrip("/"), formats.get(told, told))
    place = f"{root}/{output}".rstrip("/")
    if not inside:
        _check_apart(opened, place)
        return
    with pytest.raises(InputError, match="lies inside the source"):
        _check_apart(opened, place)
