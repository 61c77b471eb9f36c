"""The image table: what is written comes back, by any cut; damage and edits are named."""

import hashlib
import itertools
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.tables import image_files, image_table
from pipelines.tables.image_files import IMAGE_SCHEMA, ImageRow
from pipelines.tables.image_table import ImageParts, ImageTable
from pipelines.tables.row_groups import RowGroups

ROWS_PER_PART, NUM_PARTS = 60, 3


def make_row(position: int) -> ImageRow:
    image = np.random.default_rng(position).bytes(200 + 37 * (position % 11))
    return ImageRow(
        key=f"photos/{position:06d}.png",
        image=image,
        height=3 + position,
        width=4,
        label=None if position % 5 == 0 else position % 3,
        digest=hashlib.blake2b(image, digest_size=16).digest(),
        group=None if position % 2 else f"group {position // 10}",
    )


def write_table(uri: str, *, num_parts: int = NUM_PARTS, class_names=("a", "b", "c")) -> dict:
    parts = [
        image_files.write_part(
            uri,
            f"part-{part:05d}.parquet",
            (make_row(part * ROWS_PER_PART + row) for row in range(ROWS_PER_PART)),
            row_group_bytes=4_000,
        )
        for part in range(num_parts)
    ]
    return image_table.commit_manifest(
        uri,
        parts=parts,
        class_names=class_names,
        source={"uri": "somewhere"},
        options={"max_side": 0},
        rejected={"truncated": 2},
        num_items=num_parts * ROWS_PER_PART + 2,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    uri = str(tmp_path_factory.mktemp("table"))
    write_table(uri)
    return ImageTable.open(uri)


@settings(deadline=None)
@given(cut=st.lists(st.integers(0, NUM_PARTS * ROWS_PER_PART), min_size=2, max_size=2))
def test_any_row_range_comes_back(table: ImageTable, cut: list[int]) -> None:
    start, stop = sorted(cut)
    rows = table.read_rows(start, stop)
    assert rows.schema.equals(IMAGE_SCHEMA)
    expected = [vars(make_row(position)) for position in range(start, stop)]
    assert [{name: row[name] for name in IMAGE_SCHEMA.names} for row in expected] == (
        rows.to_pylist()
    )


def test_columns_can_be_chosen(table: ImageTable) -> None:
    rows = table.read_rows(10, 130, ["digest", "key"])
    assert rows.column_names == ["digest", "key"]
    assert rows["key"].to_pylist() == [make_row(i).key for i in range(10, 130)]
    assert table.read_rows(7, 7, ["key"]).num_rows == 0
    with pytest.raises(IndexError):
        table.read_rows(0, table.num_rows + 1)


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, NUM_PARTS * ROWS_PER_PART - 1), max_size=40))
def test_scattered_rows_come_back_and_each_row_group_is_read_once(
    table: ImageTable, rows: list[int]
) -> None:
    images, reads = ImageParts.open(table.uri), []
    with pytest.MonkeyPatch.context() as patch:
        real = image_table.read_row_groups
        patch.setattr(
            image_table,
            "read_row_groups",
            lambda *arguments: reads.append(arguments[1:3]) or real(*arguments),
        )
        pieces = list(images.read_scattered(rows, ["key", "image"]))
    positions = [position for where, _ in pieces for position in where.tolist()]
    assert sorted(positions) == list(range(len(rows)))
    if rows == sorted(rows):
        assert positions == sorted(positions)
    found = [row for _, piece in pieces for row in piece.to_pylist()]
    for position, row in zip(positions, found, strict=True):
        expected = make_row(rows[position])
        assert row == {"key": expected.key, "image": expected.image}
    touched = {table.row_groups.overlapping(row, row + 1)[0] for row in rows}
    assert len(reads) == len(touched)


def test_scattered_rows_outside_the_table_are_refused(table: ImageTable) -> None:
    for row in (-1, table.num_rows):
        with pytest.raises(IndexError):
            next(table.read_scattered([0, row]))


def test_row_groups_tile_the_table(table: ImageTable) -> None:
    position = 0
    for index, group in enumerate(table.row_groups):
        assert group.start == position
        assert table.read_row_group(index, ["key"]).num_rows == group.rows
        position += group.rows
    assert position == table.num_rows == 180
    assert len(table.row_groups) > 2 * NUM_PARTS
    assert table.row_groups[-1] == table.row_groups[len(table.row_groups) - 1]
    assert table.row_groups[1:3] == [table.row_groups[1], table.row_groups[2]]


def test_a_row_group_is_one_contiguous_range(table: ImageTable) -> None:
    """What makes it one request: its columns lie side by side and the images uncompressed."""
    metadata = pq.read_metadata(table.part_uri(0))
    group = metadata.row_group(1)
    columns = [group.column(i) for i in range(group.num_columns)]
    spans = sorted(
        (column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size)
        for column in columns
    )
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size == following
    image = columns[IMAGE_SCHEMA.names.index("image")]
    assert image.compression == "UNCOMPRESSED"


def test_labels_groups_and_split(table: ImageTable) -> None:
    rows = [make_row(i) for i in range(table.num_rows)]
    assert table.labels().tolist() == [-1 if row.label is None else row.label for row in rows]
    groups = [row.key if row.group is None else row.group for row in rows]
    assert table.groups() == groups
    held_out = table.held_out(0.3, seed=1)
    assert 0.15 < held_out.mean() < 0.45
    sides: dict[str, set[bool]] = {}
    for group, side in zip(groups, held_out.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert (table.held_out(0.5, seed=1) >= held_out).all(), "a larger share contains a smaller one"
    assert (table.held_out(0.3, seed=2) != held_out).any()


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(str(tmp_path / name))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["manifest.json", *(f"part-{i:05d}.parquet" for i in range(NUM_PARTS))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fingerprint_covers_digests_labels_and_class_names(tmp_path: Path) -> None:
    base = make_row(1)
    variants = {
        "same": base,
        "digest": ImageRow(**{**vars(base), "digest": bytes(16)}),
        "label": ImageRow(**{**vars(base), "label": 2}),
        "no label": ImageRow(**{**vars(base), "label": None}),
        "key": ImageRow(**{**vars(base), "key": "elsewhere"}),
    }
    found = {}
    for name, row in variants.items():
        part = image_files.write_part(str(tmp_path / name), "part-00000.parquet", [row])
        found[name] = image_table.table_fingerprint([part], ["a"])
    part = image_files.write_part(str(tmp_path / "same"), "part-00000.parquet", [base])
    assert found["same"] == found["key"] == image_table.table_fingerprint([part], ["a"])
    others = [found["digest"], found["label"], found["no label"]]
    assert len({found["same"], *others, image_table.table_fingerprint([part], ["b"])}) == 5


def test_keys_must_ascend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ascend"):
        image_files.write_part(str(tmp_path), "part-00000.parquet", [make_row(2), make_row(1)])


def test_many_threads_and_another_process_read_the_same(table: ImageTable) -> None:
    copy = pickle.loads(pickle.dumps(table))
    positions = list(range(len(table.row_groups))) * 5
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(copy.read_row_group, positions))
    for position, rows in zip(positions, read, strict=True):
        assert rows.equals(table.read_row_group(position))


def test_refusals_name_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished image table.*beit prepare"):
        ImageTable.open(str(tmp_path / "nothing"))
    uri = tmp_path / "table"
    write_table(str(uri))
    manifest = json.loads((uri / "manifest.json").read_text())

    def edited(**fields: object) -> str:
        (uri / "manifest.json").write_text(json.dumps(manifest | fields))
        return str(uri)

    with pytest.raises(InputError, match="kind is 'token_table'"):
        ImageTable.open(edited(kind="token_table"))
    with pytest.raises(InputError, match="schema_version 99"):
        ImageTable.open(edited(schema_version=99))
    with pytest.raises(InputError, match="fingerprint 0000 does not belong"):
        ImageTable.open(edited(fingerprint="0000"))
    with pytest.raises(InputError, match=r"fingerprint .* does not belong"):
        ImageTable.open(edited(class_names=["b", "a", "c"]))
    (uri / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ImageTable.open(str(uri))


def test_damage_is_found_on_reading(tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"))
    for name in ("flipped", "cut", "missing", "replaced"):
        shutil.copytree(tmp_path / "table", tmp_path / name)
    part = "part-00001.parquet"

    data = bytearray((tmp_path / "table" / part).read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "flipped" / part).write_bytes(data)
    (tmp_path / "cut" / part).write_bytes(data[:-100])
    (tmp_path / "missing" / part).unlink()
    shutil.copy(tmp_path / "table" / "part-00000.parquet", tmp_path / "replaced" / part)

    for name, message in [
        ("flipped", f"{part}: damaged .*CRC"),
        ("cut", f"{part}: damaged .*bytes instead of"),
        ("missing", f"{part}: missing"),
        ("replaced", f"{part}: damaged"),
    ]:
        with pytest.raises(InputError, match=message):
            ImageTable.open(str(tmp_path / name)).read_rows(0, 180)


def test_a_billion_images_fit_a_driver() -> None:
    """80,000 parts of 40 row groups: the index takes megabytes and answers at once."""
    groups = RowGroups([(312,) * 40] * 80_000)
    assert len(groups) == 3_200_000
    assert sum(a.nbytes for a in (groups.sizes, groups.starts, groups.part, groups.within)) < 2**27
    found = groups.overlapping(500_000_000, 500_001_000)
    assert groups[found[0]].start <= 500_000_000 < groups[found[0]].start + 312
    assert groups[found[-1]].start < 500_001_000 <= groups[found[-1]].start + 312


def test_schema_is_the_published_one() -> None:
    assert IMAGE_SCHEMA.field("image").type == pa.binary()
    assert IMAGE_SCHEMA.field("digest").type == pa.binary(16)
    nullable = [field.name for field in IMAGE_SCHEMA if field.nullable]
    assert nullable == ["label", "group"]
