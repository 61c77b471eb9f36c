"""What is new against an older table, by content."""

import dataclasses

import pytest

from pipelines import prepare
from pipelines.errors import InputError
from pipelines.preparation.against import difference
from pipelines.tables.image_table import ImageTable
from tests.pipelines.image_sources import write_folder
from tests.pipelines.prepare_fixtures import config_of, work_off
from tests.pipelines.pretrain_fixtures import write_images


def test_rows_are_compared_by_their_images(tmp_path):
    small = write_images(str(tmp_path / "small"), 40, parts=2)
    large = write_images(str(tmp_path / "large"), 48, parts=3)
    found = difference(large, small)
    assert (found.new, found.same, found.gone) == (8, 40, 0)
    back = difference(small, large)
    assert (back.new, back.same, back.gone) == (0, 40, 8)
    assert "8 rows are new, 40 are of images that it has, 0 of its rows are gone" in str(found)


def test_a_prepare_says_what_is_new(tmp_path):
    write_folder(tmp_path / "in")
    first = config_of(tmp_path / "in", tmp_path / "first")
    work_off(first)
    rows = prepare.run(first).num_rows
    doubled = tmp_path / "more"
    write_folder(doubled)
    kept = sorted(path for path in doubled.rglob("*") if path.is_file())
    kept[0].unlink()
    second = config_of(doubled, tmp_path / "second", against=str(tmp_path / "first"))
    work_off(second)
    told = prepare.run(second)
    older = difference(ImageTable.open(told.uri), ImageTable.open(str(tmp_path / "first")))
    assert told.against == str(older) and told.against in told.summary()
    assert older.same + older.new == told.num_rows and older.same > 0 and rows >= told.num_rows
    # Asked of a table that is there, without making it again.
    again = prepare.run(dataclasses.replace(second, against=""))
    assert again.already_done and again.against == ""
    with pytest.raises(InputError, match="no finished image table"):
        prepare.run(dataclasses.replace(second, against=str(tmp_path / "nothing")))
