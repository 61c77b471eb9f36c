"""`prepare` through Ray: all items accounted for, the same bytes always, resumable, on any disk."""

import dataclasses
import hashlib
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

from beit.images import decode_image, image_digest
from pipelines import prepare, storage
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.preparation import source_plan
from pipelines.preparation import unit as prepare_unit
from pipelines.preparation.readers import Reader
from pipelines.preparation.walking import Entry
from pipelines.tables.image_table import ImageTable
from tests.faulty_proxy import faulty_proxy
from tests.pipelines.image_sources import (
    CRASH_MARK,
    encoded,
    hf_table,
    pixels,
    saved,
    tar_bytes,
    write_folder,
    write_parquet,
    write_tars,
)
from tests.pipelines.prepare_fixtures import config_of, unit_task, work_off
from tests.s3_server import S3Store, bucket, s3  # noqa: F401 - fixtures

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FRAGILE = "tests.pipelines.image_sources:fragile_decode"


def file_hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def rejected_rows(table: ImageTable) -> list[tuple[str, str]]:
    rows = pq.read_table(storage.open_input(storage.join(table.uri, "rejected.parquet")))
    return [(row["key"], row["reason"]) for row in rows.to_pylist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tree"
    write_folder(root, per_class=12)
    return root


# One source after another


def test_a_folder_becomes_a_table(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", part_mb=0.01, row_group_mb=0.002)
    result = prepare.run(config)
    assert (result.num_rows, result.num_items, result.rejected) == (36, 36, {})
    assert result.class_names == ("ant", "bee", "cat") and not result.already_done

    table = ImageTable.open(config.output)
    assert table.fingerprint == result.fingerprint
    assert len(table.parts) == result.num_parts > 2 and len(table.row_groups) > len(table.parts)
    rows = table.read_rows(0, 36).to_pylist()
    assert [row["key"] for row in rows] == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.jpg")
    )
    for row in rows:
        assert row["image"] == (folder / row["key"]).read_bytes()
        assert row["digest"] == image_digest(row["image"])
        assert (row["height"], row["width"]) == (24, 32)
        assert table.class_names[row["label"]] == row["key"].partition("/")[0]
        assert row["group"] is None
    assert rejected_rows(table) == []
    manifest = table.manifest
    assert manifest["source"] == {"uri": str(folder), "format": "folder"}
    assert manifest["num_items"] == 36 and manifest["options"]["part_mb"] == 0.01
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    others = ["manifest.json", "rejected.parquet", "ignored.parquet"]
    assert names == sorted([*others, *(part.name for part in table.parts)])


def test_done_is_done(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = config_of(folder, tmp_path / "out")
    first = prepare.run(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = prepare.run(dataclasses.replace(config, max_rejected=7, num_tasks=1))
    assert again == dataclasses.replace(first, already_done=True)
    assert "already done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    for change, message in [
        ({"max_side": 64}, r"max_side = 64, but .* was prepared with max_side = 0"),
        ({"source": str(folder / "ant")}, r"source = '.*ant', but .* with source = '.*tree'"),
        ({"labels": "none"}, r"labels = 'none', but .* was prepared with labels = 'auto'"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare.run(dataclasses.replace(config, **change))


def test_parallelism_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    options = {"part_mb": 0.004, "row_group_mb": 0.002, "max_side": 20}
    for name, tasks in [("one", 1), ("six", 6)]:
        prepare.run(config_of(folder, tmp_path / name, num_tasks=tasks, **options))
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "six")
    table = ImageTable.open(str(tmp_path / "one"))
    assert len(table.parts) > 5
    assert {(row["height"], row["width"]) for row in table.read_rows(0, 36).to_pylist()} == {
        (15, 20)
    }


def test_tars_and_parquet(tmp_path: Path) -> None:
    rows = write_tars(tmp_path / "tars")
    result = prepare.run(config_of(tmp_path / "tars", tmp_path / "from-tars", part_mb=0.01))
    table = ImageTable.open(result.uri)
    read = table.read_rows(0, table.num_rows).to_pylist()
    assert {row["key"]: (row["image"], row["label"]) for row in read} == rows
    assert [row["key"] for row in read] == sorted(rows) and len(table.parts) > 1
    assert table.class_names == ["0", "1", "2", "3"]
    assert result.class_counts == (5, 5, 4, 4) and "(by member .cls)" in result.summary()

    images = [encoded(i) for i in range(9)]
    labels = [i % 2 for i in range(9)]
    write_parquet(tmp_path / "hf" / "a.parquet", hf_table(images[:6], labels[:6], ["no", "yes"]))
    write_parquet(tmp_path / "hf" / "b.parquet", hf_table(images[6:], labels[6:], ["no", "yes"]))
    result = prepare.run(config_of(tmp_path / "hf", tmp_path / "from-hf", part_mb=0.004))
    table = ImageTable.open(result.uri)
    read = table.read_rows(0, 9).to_pylist()
    assert [row["image"] for row in read] == images
    assert table.labels().tolist() == labels and table.class_names == ["no", "yes"]
    assert read[6]["key"] == "b.parquet/0000000000"


def test_the_sample_splits_by_base_emoji(tmp_path: Path) -> None:
    config = config_of("sample:emoji", tmp_path / "emoji", part_mb=2, row_group_mb=0.5)
    result = prepare.run(config)
    assert (result.num_rows, len(result.class_names), result.rejected) == (4009, 9, {})
    table = ImageTable.open(result.uri)
    held_out = table.held_out(0.2)
    groups = np.asarray(table.groups())
    assert 0.1 < held_out.mean() < 0.3
    assert not set(groups[held_out]) & set(groups[~held_out])
    assert (table.labels() == -1).sum() == 236
    assert "236 images without a label" in result.summary()


# Bad input


def bad_images() -> dict[str, tuple[bytes, str | tuple[int, int]]]:
    """Name -> (bytes, reason or the size of the normalised image)."""
    good = encoded(1, height=60, width=80, quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour = Image.fromarray(pixels(2, 40, 50))
    first, *others = (Image.fromarray(pixels(seed, 20, 30)) for seed in range(3))
    moving = saved(first, "GIF", save_all=True, append_images=others)
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    profile = colour.copy()
    profile.info["icc_profile"] = b"no profile at all" * 9
    bomb = b"\x89PNG\r\n\x1a\n" + saved(Image.new("1", (30000, 30000)), "PNG")[8:]
    return {
        "animated.gif": (moving, (20, 30)),
        "bomb.png": (bomb, "too_many_pixels"),
        "cmyk.jpg": (saved(colour.convert("CMYK"), "JPEG"), (40, 50)),
        "empty.jpg": (b"", "empty"),
        "error.jpg": (b"<!DOCTYPE html><html><h1>404 Not Found</h1></html>", "not_an_image"),
        "grey16.png": (saved(grey16, "PNG"), (30, 40)),
        "long.png": (saved(Image.new("RGB", (30000, 2), "red"), "PNG"), (2, 30000)),
        "one.png": (encoded(3, "PNG", height=1, width=1), (1, 1)),
        "palette.png": (saved(palette, "PNG", transparency=3), (40, 50)),
        "picture.txt": (good, (60, 80)),
        "profile.jpg": (saved(profile, "JPEG", icc_profile=b"no profile" * 9), (40, 50)),
        "really.png.jpg": (encoded(4, "PNG"), (24, 32)),
        "rotated.jpg": (saved(colour, "JPEG", exif=exif), (50, 40)),
        "text.jpg": (b"these are words\n" * 20, "not_an_image"),
        "truncated.jpg": (good[: len(good) // 2], "truncated"),
    }


def test_bad_input_is_normalised_or_listed(tmp_path: Path) -> None:
    cases = bad_images()
    source = tmp_path / "source"
    source.mkdir()
    for name, (data, _) in cases.items():
        (source / name).write_bytes(data)
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere")
    result = prepare.run(config_of(source, tmp_path / "out", max_rejected=6))
    table = ImageTable.open(result.uri)
    rows = {row["key"]: row for row in table.read_rows(0, table.num_rows).to_pylist()}
    usable = {name: size for name, (_, size) in cases.items() if isinstance(size, tuple)}
    assert {name: (row["height"], row["width"]) for name, row in rows.items()} == usable
    for name, row in rows.items():
        assert row["image"] == cases[name][0]
        assert decode_image(row["image"]).size == (row["width"], row["height"])
    refused = {name: why for name, (_, why) in cases.items() if isinstance(why, str)}
    assert dict(rejected_rows(table)) == refused | {"gone.jpg": "missing"}
    assert result.num_items == len(cases) + 1 == result.num_rows + sum(result.rejected.values())


def test_too_much_bad_input_stops_the_stage(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "source")
    for i in range(5):
        (tmp_path / "source" / "bee" / f"bad-{i}.jpg").write_bytes(b"" if i % 2 else b"text")
    config = config_of(tmp_path / "source", tmp_path / "out", part_mb=0.003, max_rejected=4)
    message = r"5 of \d+ items .* max_rejected = 4 tolerates 4.*3 not_an_image, 2 empty"
    with pytest.raises(StageFailed, match=message):
        prepare.run(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(StageFailed, match=r"max_rejected = 0\.2 tolerates 4"):
        prepare.run(dataclasses.replace(config, max_rejected=0.2))
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    result = prepare.run(dataclasses.replace(config, max_rejected=0.25))
    assert result.rejected == {"empty": 2, "not_an_image": 3} and result.num_rows == 15
    for name, written in parts.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == written, "nothing is done twice"


def test_duplicate_keys_keep_the_first(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    members = [("a.jpg", encoded(1)), ("b.jpg", encoded(2)), ("a.jpg", encoded(3))]
    (tmp_path / "tars" / "x.tar").write_bytes(tar_bytes(members))
    result = prepare.run(config_of(tmp_path / "tars", tmp_path / "out", max_rejected=1))
    table = ImageTable.open(result.uri)
    assert table.read_rows(0, 2)["image"].to_pylist() == [encoded(1), encoded(2)]
    assert rejected_rows(table) == [("x.tar/a.jpg", "duplicate_key")]


def test_an_image_that_kills_its_decoder_is_quarantined(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "source")
    for name in ("ant/002.jpg", "cat/004.jpg"):
        (tmp_path / "source" / name).write_bytes(files[name] + CRASH_MARK)
    config = config_of(tmp_path / "source", tmp_path / "out", max_rejected=2, part_mb=0.004)
    result = prepare.run(config, decoder=FRAGILE)
    assert result.rejected == {"decoder_crash": 2} and result.num_rows == 13
    table = ImageTable.open(result.uri)
    assert [key for key, _ in rejected_rows(table)] == ["ant/002.jpg", "cat/004.jpg"]


def test_a_source_without_images_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("nothing to see")
    with pytest.raises(StageFailed, match="no usable image among 0 items; ignored: 1 not_an"):
        prepare.run(config_of(tmp_path / "source", tmp_path / "out", max_rejected=5))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bit flips, truncation, a spliced header, a moved or repeated piece."""
    mutant = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice([1, 4, 30])):
            mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del mutant[rng.randrange(len(mutant)) :]
    elif kind == 2:
        other = rng.choice(SEEDS)
        at = rng.randrange(4, 64)
        mutant[:at] = other[: rng.randrange(4, 64)]
    elif kind == 3:
        at, size = rng.randrange(len(mutant)), rng.randrange(1, 200)
        mutant[at:at] = mutant[at : at + size]
    else:
        at = rng.randrange(len(mutant))
        mutant[at : at + rng.choice([2, 4, 8])] = bytes([rng.choice([0, 255, 127])]) * 4
    return bytes(mutant)


SEEDS = [
    encoded(1, height=40, width=60),
    encoded(2, height=40, width=60, progressive=True),
    encoded(3, "PNG"),
    encoded(4, "GIF"),
    encoded(5, "WEBP"),
    encoded(6, "BMP"),
    encoded(7, "TIFF"),
    encoded(8, "JPEG2000", height=40, width=60),
    encoded(9, "AVIF"),
    encoded(10, "PPM"),
]


@pytest.mark.parametrize("number", [600, pytest.param(2_400, marks=pytest.mark.long)])
def test_mutants_are_all_accounted_for(number: int, tmp_path: Path) -> None:
    rng = random.Random(20)
    source = tmp_path / "source"
    source.mkdir()
    mutants = {f"{i:05d}.img": mutate(rng.choice(SEEDS), rng) for i in range(number)}
    for name, data in mutants.items():
        (source / name).write_bytes(data)
    config = config_of(
        source, tmp_path / "out", part_mb=0.3, max_rejected=number, max_pixels=2_000_000
    )
    result = prepare.run(config)
    table = ImageTable.open(result.uri)
    rejected = rejected_rows(table)
    accepted = table.read_rows(0, table.num_rows)
    keys = accepted["key"].to_pylist()
    assert sorted(keys + [key for key, _ in rejected]) == sorted(mutants)
    assert result.num_rows > number // 12 and len(rejected) > number // 12
    assert "decoder_timeout" not in result.rejected
    # What was accepted can be decoded by every later stage.
    for row in accepted.to_pylist()[::7]:
        assert row["image"] == mutants[row["key"]]
        assert decode_image(row["image"]).size == (row["width"], row["height"])


# Interruption


def test_an_interrupted_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"part_mb": 0.004, "row_group_mb": 0.002}
    prepare.run(config_of(folder, tmp_path / "whole", **options))
    config = config_of(folder, tmp_path / "out", **options)
    outcomes = prepare._outcomes

    def interrupted(*args):
        for number, outcome in enumerate(outcomes(*args)):
            yield outcome
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_outcomes", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"3 of \d+ units are done; the same command"):
        prepare.run(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(InputError, match="quality = 50"):
        prepare.run(dataclasses.replace(config, quality=50))

    receipts = {path.stem for path in (tmp_path / "out/_work/receipts").glob("*.json")}
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    begun = []

    def counted(task, plan, todo, num_tasks):
        begun.extend(todo)
        return outcomes(task, plan, todo, num_tasks)

    monkeypatch.setattr(prepare, "_outcomes", counted)
    prepare.run(config)
    assert len(receipts) >= 3
    assert not {int(name) for name in receipts} & set(begun), "no finished unit is done again"
    for name, written in done.items():
        if f"{int(name[5:10]):08d}" in receipts:
            assert (tmp_path / "out" / name).stat().st_mtime_ns == written
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


def test_a_lost_or_damaged_part_is_made_again(folder: Path, tmp_path: Path) -> None:
    options = {"part_mb": 0.004}
    prepare.run(config_of(folder, tmp_path / "whole", **options))
    config = config_of(folder, tmp_path / "out", max_rejected=0, **options)
    work_off(config)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    (tmp_path / "out" / "part-00002.parquet").write_bytes(b"half a part")
    (tmp_path / "out" / "_work" / "receipts" / "00000003.json").unlink()
    prepare.run(config)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


def test_two_drivers_at_once_do_no_harm(folder: Path, tmp_path: Path) -> None:
    options = {"part_mb": 0.004}
    prepare.run(config_of(folder, tmp_path / "whole", **options))
    results: list[object] = []

    def drive() -> None:
        try:
            results.append(prepare.run(config_of(folder, tmp_path / "out", **options)))
        except BaseException as error:
            results.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [getattr(result, "num_rows", result) for result in results] == [36, 36]
    whole = file_hashes(tmp_path / "whole")
    assert {name: file_hashes(tmp_path / "out")[name] for name in whole} == whole


def test_a_failing_unit_is_told_without_a_wall_of_frames(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", part_mb=0.004)
    source_plan.make_plan(config, config.output)
    listing = tmp_path / "out/_work/units/00000003.parquet"
    planned = listing.read_bytes()
    listing.unlink()
    with pytest.raises(StageFailed, match=r"unit 3: FileNotFoundError.*\n.*the same command"):
        prepare.run(config)
    listing.write_bytes(planned[:-1])
    with pytest.raises(InputError, match="the source changed while two runs were planning"):
        prepare.run(config)
    listing.write_bytes(planned)
    assert prepare.run(config).num_rows == 36


def test_killed_workers_cost_nothing_but_time(tmp_path: Path) -> None:
    """Workers are killed with SIGKILL again and again; the table is that of a quiet run."""
    write_folder(tmp_path / "source", per_class=400)
    options = {"part_mb": 0.02, "num_tasks": 3}
    prepare.run(config_of(tmp_path / "source", tmp_path / "quiet", **options))
    config = config_of(tmp_path / "source", tmp_path / "out", **options)
    plan = source_plan.make_plan(config, config.output)
    kills, over = [], threading.Event()
    # Workers are children of their raylet; only those of this test's own Ray are touched.
    parent = ray.remote(lambda: os.getppid())  # noqa: PLW0108 - Ray takes no built-in function
    raylet = psutil.Process(ray.get(parent.remote()))

    def kill() -> None:
        rng = random.Random(5)
        while not over.wait(0.3) and len(kills) < 8:
            workers = [
                process
                for process in raylet.children()
                if "MapBatches(process)" in " ".join(process.cmdline())
            ]
            if workers:
                rng.choice(workers).kill()
                kills.append(1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = prepare.run(config, decoder="tests.pipelines.image_sources:slow_decode")
    finally:
        over.set()
        killer.join()
    assert len(kills) >= 3 and result.num_rows == 1200 and len(plan.listings) > 20
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "quiet")


def test_a_unit_may_take_longer_than_ray_data_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "source", classes=("ant",))
    settings = ray.data.DataContext.get_current()
    monkeypatch.setattr(settings, "execution_no_progress_timeout_s", 2.0)
    config = config_of(tmp_path / "source", tmp_path / "out")
    result = prepare.run(config, decoder="tests.pipelines.image_sources:slowest_decode")
    assert result.num_rows == 5
    assert settings.execution_no_progress_timeout_s == 2.0, "nobody else's datasets are touched"


def test_a_file_that_kills_its_reader_is_quarantined(tmp_path: Path) -> None:
    """After three deaths at a unit its files are tried in processes of their own."""
    rows = write_tars(tmp_path / "tars")
    config = config_of(tmp_path / "tars", tmp_path / "out")
    plan = source_plan.make_plan(config, config.output)
    rehearsal = "tests.pipelines.image_sources:fragile_rehearsal"
    task = unit_task(config, plan, rehearsal=rehearsal)
    summary = prepare_unit.process_unit(task, 0, plan.listings[0], deaths=3)
    assert summary["rejected"] == {"reader_crash": 1}
    assert summary["examples"] == [
        ["shard-001.tar", "reader_crash", (tmp_path / "tars/shard-001.tar").stat().st_size]
    ]
    parts = prepare_unit.read_receipt(config.output, 0).parts
    assert sum(part.rows for part in parts) == len(rows) * 2 // 3

    (tmp_path / "out/_work/receipts/00000000.json").unlink()
    with pytest.raises(StageFailed, match=r"shard-000.tar to shard-002.tar.*lack of memory"):
        prepare_unit.process_unit(task, 0, plan.listings[0], deaths=12)


def test_the_rows_of_a_quarantined_row_group_are_listed() -> None:
    reader = Reader(root="x", format="parquet", labels="none", max_image_bytes=1)
    entry = Entry(path="a.parquet", size=9, first=1, stop=2, row=4, rows=3, reason="reader_crash")
    assert [(item.key, item.reason) for item in reader.items([entry])] == [
        (f"a.parquet/{row:010d}", "reader_crash") for row in (4, 5, 6)
    ]


# Scale, stores, tracking


def test_wrong_options_are_named() -> None:
    for fields, message in [
        ({"output": ""}, "output is empty"),
        ({"source": ""}, "source is empty"),
        ({"quality": 0}, "quality = 0: must be at least 1 and at most 100"),
        ({"group_pattern": "("}, r"group_pattern = '\('"),
        ({"group_pattern": "a"}, "put a part in parentheses"),
        ({"group_pattern": "(a)", "group_field": "b"}, "group_pattern is set too"),
        ({"max_side": 3}, "max_side = 3"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare.run(config_of(**({"source": "a", "output": "b"} | fields)))


def test_an_output_inside_its_source_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(InputError, match="lies inside the source"):
        prepare.run(config_of(folder, tmp_path / "link/out"))
    with pytest.raises(InputError, match="lies inside the source"):
        prepare.run(config_of(tmp_path / "link", folder / "out"))
    with pytest.raises(InputError, match="lies inside the source"):
        prepare.run(config_of(folder, folder / "table"))
    for fields, message in [
        ({"key_field": "id"}, "only Parquet sources have columns"),
        ({"labels": "field"}, "images in folders have no fields"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare.run(config_of(folder, folder.parent / "out", **fields))


def test_planning_does_not_grow_with_images(tmp_path: Path) -> None:
    """Listed files pass through; what stays is a hash per unit."""
    import tracemalloc

    entries = (Entry(path=f"{i // 1000:06d}/{i:09d}.jpg", size=50_000) for i in range(300_000))
    units = source_plan.cut(entries, 256_000_000, max_entries=source_plan.MAX_UNIT_ENTRIES)
    tracemalloc.start()
    listings = list(source_plan._write_listings(str(tmp_path), units))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(listings) == 59
    # 32 listings of 5,120 entries in flight; all entries at once would take four times that.
    assert peak < 70e6, peak


def test_s3_in_and_out_through_a_network_that_fails(
    folder: Path,
    tmp_path: Path,
    s3: S3Store,  # noqa: F811
    bucket: str,  # noqa: F811
) -> None:
    prepare.run(config_of(folder, tmp_path / "local", part_mb=0.004))
    storage.store_dir(folder, s3.uri(bucket, "source"))
    with faulty_proxy(s3.port, rate=0.15, seed=3) as proxy:
        source = s3.uri(bucket, "source", port=proxy.port)
        output = s3.uri(bucket, "out", port=proxy.port)
        result = prepare.run(config_of(source, output, part_mb=0.004))
        table = ImageTable.open(output)
        assert table.read_rows(0, 36).equals(
            ImageTable.open(str(tmp_path / "local")).read_rows(0, 36)
        )
        again = prepare.run(config_of(source, output, part_mb=0.004))
    assert again.already_done and again.fingerprint == result.fingerprint
    faults = {name for name in proxy.counts if name != "ok"}
    assert len(faults) >= 4, proxy.counts
    local = file_hashes(tmp_path / "local")
    left = {file.path for file in storage.list_files(s3.uri(bucket, "out"))}
    assert left == set(local), "working files are cleared away, nothing else is left"
    for name in sorted(left - {"manifest.json"}):
        data = storage.read_bytes(s3.uri(bucket, "out", name))
        assert hashlib.blake2b(data).hexdigest() == local[name]
    mine = json.loads((tmp_path / "local" / "manifest.json").read_text())
    theirs = table.manifest
    assert {k: v for k, v in mine.items() if k != "source"} == {
        k: v for k, v in theirs.items() if k != "source"
    }


def test_the_run_is_tracked(folder: Path, tmp_path: Path, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "good.png").write_bytes(encoded(1, "PNG"))
    (tmp_path / "source" / "bad.png").write_bytes(b"")
    config = config_of(
        tmp_path / "source",
        tmp_path / "out",
        max_rejected=1,
        tracking=TrackingConfig(uri=mlflow_uri),
    )
    result = prepare.run(config)
    client = MlflowClient(mlflow_uri)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["source"] == config.source
    assert run.data.metrics["images"] == 1 and run.data.metrics["rejected/empty"] == 1
    assert run.data.tags["beit.output.image_table"] == result.fingerprint
    files = [file.path for file in client.list_artifacts(result.run_id)]
    assert "rejected.json" in files and "images" in files
    assert result.fingerprint in result.summary() and "1 empty" in result.summary()
