"""What a prepare tells, and the bound on what it may reject: by items, by bytes, and early."""

import pytest

from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError, StageFailed, printable
from pipelines.preparation.readers import Reader
from pipelines.preparation.report import PrepareResult, Totals
from pipelines.preparation.source_plan import SourcePlan
from tests.pipelines.image_sources import encoded, tar_bytes
from tests.pipelines.prepare_fixtures import config_of, work_off

UNITS, ITEMS, BYTES = 100, 10, 1000


def totals(done: int, *, rejected=0, lost_bytes=0, known=False, max_rejected=0.05) -> Totals:
    plan = SourcePlan(
        source={},
        options={},
        reader=Reader(root="", format="webdataset", labels="none", max_image_bytes=1),
        num_items=UNITS * ITEMS if known else None,
        num_bytes=UNITS * BYTES,
        listings=("",) * UNITS,
    )
    config = PrepareConfig(source="a", output="b", max_rejected=max_rejected)
    counts = {"source_bytes": BYTES, "lost_bytes": lost_bytes, "rejected": {"empty": rejected}}
    counts["ignored"] = {"hidden": 1000}
    units = ({"unit": unit, "items": ITEMS, "examples": [], **counts} for unit in range(done))
    return Totals(config, plan, units)


@pytest.mark.parametrize(
    ("done", "fields", "stops"),
    [
        # Every item of the tars so far; the estimate of all is 1000 and has a margin of two.
        (10, {"rejected": 10}, False),
        (11, {"rejected": 10}, True),
        (99, {"rejected": 1}, False),
        (11, {"rejected": 10, "max_rejected": 0.5}, False),
        (11, {"rejected": 10, "max_rejected": "5%"}, True),
        (11, {"rejected": 10, "max_rejected": "50 %"}, False),
        (99, {"rejected": 10, "lost_bytes": 1000, "max_rejected": "100%"}, False),
        (2, {"rejected": 10, "max_rejected": 0.001}, False),
        (3, {"rejected": 10, "max_rejected": 0.001}, True),
        (6, {"rejected": 10, "known": True}, True),
        (5, {"rejected": 10, "known": True}, False),
        (6, {"rejected": 10, "max_rejected": 59}, True),
        (6, {"rejected": 10, "max_rejected": 59.0}, True),
        (6, {"rejected": 10, "max_rejected": 60}, False),
        # One item each, but the bytes of many.
        (6, {"rejected": 1, "lost_bytes": 800}, False),
        (7, {"rejected": 1, "lost_bytes": 800}, True),
        (7, {"rejected": 1, "lost_bytes": 800, "max_rejected": 50}, False),
    ],
)
def test_a_stage_stops_when_it_is_clear(done: int, fields: dict, stops: bool) -> None:
    book = totals(done, **fields)
    if not stops:
        book.check(final=False)
        return
    with pytest.raises(StageFailed, match="the same command then goes on") as failure:
        book.check(final=False)
    assert ("bytes lie in files" in str(failure.value)) == ("lost_bytes" in fields)


@pytest.mark.parametrize("limit", [1.0, 1.5, -1, True, "1.0", "5", "101%", "five%", "", "%"])
def test_a_share_and_a_number_do_not_look_alike(limit) -> None:
    message = r"max_rejected = .*: give a share as 5% or 0\.05 \(all items: 100%\), or a number"
    with pytest.raises(InputError, match=message):
        PrepareConfig(source="a", output="b", max_rejected=limit)


def test_at_the_end_nothing_is_estimated() -> None:
    totals(100, rejected=0).check(final=True)
    with pytest.raises(StageFailed, match=r"100 of 1000 items.*tolerates 50"):
        totals(100, rejected=1).check(final=True)


def test_names_are_told_as_printable_text() -> None:
    """A name may hold what sets a terminal's title and colour, or looks like another line."""
    odd = "a\x1b]0;owned\x07\x1b[31m\nb\u202e\udcff"
    assert printable(odd) == r"a\x1b]0;owned\x07\x1b[31m\nb\u202e\udcff"
    assert printable("caf\u00e9 #%?: '\u65e5\u672c'") == "caf\u00e9 #%?: '\u65e5\u672c'"
    book = totals(100, rejected=1)
    book.examples = [[odd, "empty", 0]]
    with pytest.raises(StageFailed, match=r"empty: a\\x1b]0;owned") as failure:
        book.check(final=True)
    assert printable(str(failure.value), keep="\n") == str(failure.value)


def test_lost_bytes_are_those_of_containers(tmp_path) -> None:
    whole = tar_bytes([("a.jpg", encoded(1)), ("b.jpg", b"text")])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cut.tar").write_bytes(whole[:700])
    (tmp_path / "in/text.tar").write_bytes(b"text" * 100)
    (tmp_path / "in/whole.tar").write_bytes(whole)
    [summary] = work_off(config_of(tmp_path / "in", tmp_path / "out"))
    assert summary["rejected"] == {"bad_tar": 2, "not_an_image": 1, "truncated": 1}
    assert summary["lost_bytes"] == 700 + 400


@pytest.mark.parametrize(
    ("source_format", "options", "names", "counts", "told"),
    [
        ("folder", {}, "owl cat dog", [4, 812, 790],
         "3 classes: cat 812, dog 790, owl 4 (by first folder), 94 images without a label"),
        ("folder", {"label_level": 2}, "a", [1700],
         "1 class: a 1700 (by folder 2 below the source)"),
        ("parquet", {"label_field": "kind"}, "a b", [850, 850],
         "2 classes: a 850, b 850 (by column kind)"),
        ("parquet", {}, "a", [1700], "1 class: a 1700 (by column label)"),
        ("webdataset", {"label_field": "json:n"}, "0", [1700],
         "1 class: 0 1700 (by member .json:n)"),
        ("webdataset", {}, "0 1", None, "2 classes (by member .cls)"),
        ("folder", {}, "", [], "no labels"),
        ("folder", {}, "a b c d e f g h i j k l m", [1] * 12 + [1688],
         "13 classes: m 1688, a 1, b 1, c 1, d 1, e 1, f 1, g 1, h 1, i 1, ..., l 1 "
         "(by first folder)"),
    ],
)  # fmt: skip
def test_classes_are_told_with_what_made_them(source_format, options, names, counts, told) -> None:
    manifest = {
        "fingerprint": "f", "num_rows": 1700, "num_items": 1700, "parts": [{}], "rejected": {},
        "class_names": names.split(), "source": {"format": source_format}, "options": options,
    } | ({} if counts is None else {"class_counts": counts})  # fmt: skip
    result = PrepareResult.of("out", manifest, already_done=False)
    assert result.summary() == f"out: 1700 images in 1 part, 0 rejected, {told}, fingerprint f"
    manifest["ignored"] = {"hidden": 2, "not_an_image": 3}
    said = PrepareResult.of("out", manifest, already_done=False).summary()
    listed = "5 ignored (3 not_an_image, 2 hidden: out/ignored.parquet), "
    assert f"0 rejected, {listed}" in said
    manifest["rejected"] = {"truncated": 1}
    said = PrepareResult.of("out", manifest, already_done=False).summary()
    assert f"1 rejected (1 truncated: out/rejected.parquet), {listed}" in said
