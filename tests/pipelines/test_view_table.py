"""A view table holds the exact views, slot by slot, and what is not as written is refused."""

import json
import shutil

import numpy as np
import pytest

from beit.images import decode_image, image_digest
from beit.views import ViewPolicy, render, sample_view, view_of
from pipelines import audit, storage
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError, StageFailed
from pipelines.rendering import files as render_files
from pipelines.rendering import plan as render_plan
from pipelines.rendering import work as render_work
from pipelines.tables import view_files
from pipelines.tables.image_table import ImageTable
from pipelines.tables.unit_files import encode_manifest
from pipelines.tables.view_files import cut_row_groups, decode_view
from pipelines.tables.view_table import ViewTable, check_windows
from tests.pipelines.ingest_fixtures import NUM_ROWS, POLICY, encoded, write_images
from tests.pipelines.view_fixtures import write_views


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    images = write_images(str(root / "images"))
    write_views(images, root / "views", num_views=3, policy=POLICY)
    for form in view_files.JPEG:
        write_views(images, root / form, num_views=1, policy=POLICY, form=form)
    return root


@pytest.fixture
def copied(root, tmp_path):
    shutil.copytree(root / "views", tmp_path / "views")
    return tmp_path / "views"


def shown(row, view):
    """The exact view."""
    data = encoded(row)
    image = decode_image(data)
    drawn = sample_view(POLICY, image_digest(data), view, image.height, image.width)
    return render(image, drawn, 32).transpose(2, 0, 1)


def rows_of(table, slot):
    """(row, digest, pixels) of all rows in a slot."""
    for position, group in enumerate(table.row_groups):
        for number, row in enumerate(table.read_group(position, slot).to_pylist()):
            pixels = decode_view(row["image"], table.identity.form, 32, key=row["key"])
            yield group.start + number, row["digest"], pixels


def test_slots_hold_the_exact_views_of_their_epoch(root):
    table = ViewTable.open(str(root / "views"))
    for slot in range(3):
        rows = list(rows_of(table, slot))
        assert [row for row, _, _ in rows] == list(range(NUM_ROWS))
        views = [view_of(digest, slot, range(3)) for _, digest, _ in rows]
        assert set(views) == {0, 1, 2}
        for (row, _, pixels), view in zip(rows, views, strict=True):
            assert np.array_equal(pixels, shown(row, view)), (slot, row)


def test_jpegs_are_near(root):
    means = []
    for form in ("jpeg95", "jpeg90"):
        table = ViewTable.open(str(root / form))
        errors = [np.abs(p.astype(int) - shown(row, 0)).mean() for row, _, p in rows_of(table, 0)]
        means.append(np.mean(errors))
    assert 0 < means[0] < 1.5
    assert means[0] < means[1] < 3


def test_units_are_whole_row_groups_and_every_row_is_in_one(root):
    images = ViewTable.open(str(root / "views"))
    parts = json.loads((root / "images/manifest.json").read_text())["parts"]
    parts = [render_work.Part.from_dict(part) for part in parts]
    for most in (1, 20, 10**6):
        units = render_plan.plan_units(parts, most)
        edges = set(np.cumsum([0, *images.row_groups.sizes]).tolist())
        assert set(units.first.tolist()) <= edges
        assert units.sizes.sum() == NUM_ROWS
        assert (units.first[1:] == np.cumsum(units.sizes)[:-1]).all()
        assert len(units) == {1: len(images.row_groups), 10**6: 3}.get(most, len(units))
    assert cut_row_groups([150, 0, 64, 5], 64) == [50, 50, 50, 64, 5]


def test_a_table_is_read_by_the_cut_it_was_written_with(root, tmp_path, monkeypatch):
    monkeypatch.setattr(render_plan, "ROW_GROUP_ROWS", 4)
    images = ImageTable.open(str(root / "images"))
    uri = write_views(images, tmp_path / "views", num_views=3, policy=POLICY)
    monkeypatch.undo()
    table = ViewTable.open(uri)
    assert table.row_groups.sizes.max() == table.manifest["row_group_rows"] == 4
    assert [row for row, _, _ in rows_of(table, 0)] == list(range(NUM_ROWS))
    with pytest.raises(InputError, match="row_group_rows: 64 != 4"):
        check_windows([ViewTable.open(str(root / "views")), table], range(6))


def test_a_file_that_is_cut_otherwise_is_not_whole(root):
    table = ViewTable.open(str(root / "views"))
    data, sizes = storage.read_bytes(table.file_uri(0)), table.sizes_of(0)
    assert len(sizes) > 1
    assert view_files.check_file(table.identity, data, sizes) == (True, None)
    assert view_files.check_file(table.identity, data, [sum(sizes)]) == (False, None)


def test_a_field_that_was_changed_is_named(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text()) | {"image_size": 64}
    path.write_bytes(encode_manifest(manifest))
    with pytest.raises(InputError, match="fingerprint"):
        ViewTable.open(str(copied))
    # With an honest fingerprint the files still say what they are.
    del manifest["fingerprint"]
    manifest["fingerprint"] = storage.digest(encode_manifest(manifest))
    path.write_bytes(encode_manifest(manifest))
    with pytest.raises(InputError, match="image_size: 64 != 32"):
        ViewTable.open(str(copied))


def test_another_codec_is_refused_by_name(root, monkeypatch):
    monkeypatch.setitem(view_files.CODECS, "lossless", "zstd of something newer")
    with pytest.raises(InputError, match="codec 'zstd of uint8"):
        ViewTable.open(str(root / "views"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": ViewPolicy(seed=12)}, "policy.seed: 11 != 12"),
        ({"image_size": 224}, "image_size: 32 != 224"),
        ({"image_fingerprint": "f" * 32}, "image_fingerprint"),
    ],
)
def test_views_of_something_else_are_refused_by_name(root, changes, message):
    table = ViewTable.open(str(root / "views"))
    wanted = {
        "image_fingerprint": table.image_fingerprint, "policy": POLICY, "image_size": 32,
    }  # fmt: skip
    table.check_compatible(**wanted)
    with pytest.raises(InputError, match=message):
        table.check_compatible(**wanted | changes)


def test_windows_that_do_not_fit_are_refused_by_name(root):
    table = ViewTable.open(str(root / "views"))
    check_windows([table], range(3))
    with pytest.raises(InputError, match=r"views \[0, 1, 2\], but trained on are \[0, 1, 2, 3\]"):
        check_windows([table], range(4))
    other = ViewTable.open(str(root / "jpeg95"))
    with pytest.raises(InputError, match="codec"):
        check_windows([table, other], range(4))
    # As where tables come without tokens: what is trained on is what they hold.
    with pytest.raises(InputError, match=r"view 0 is in both of .*; render further views"):
        check_windows([table, table], [0, 1, 2, 0, 1, 2])


def test_what_was_written_before_a_field_of_the_policy_existed_has_its_default(root):
    table = ViewTable.open(str(root / "views"))
    record = table.identity.to_dict()
    del record["policy"]["saturation"]
    stamp = {view_files.STAMP: json.dumps(record).encode()}
    assert view_files.ViewIdentity.from_dict(record) == table.identity
    assert view_files.stamp_of(stamp) == table.identity.to_dict()


def test_damage_is_refused_by_name(copied):
    table = ViewTable.open(str(copied))
    name = table.file_name(1)
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 16
    (copied / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(rows_of(table, 0))
        list(rows_of(table, 1))
        list(rows_of(table, 2))
    with pytest.raises(StageFailed, match=f"{name}: hash"):
        audit.run(AuditConfig(table=str(copied)))


def test_a_file_that_is_gone_is_named(copied):
    table = ViewTable.open(str(copied))
    (copied / table.file_name(1)).unlink()
    with pytest.raises(InputError, match=f"{table.file_name(1)}: missing"):
        list(rows_of(table, 0))
    (copied / table.file_name(0)).unlink()
    with pytest.raises(InputError, match=f"{table.file_name(0)}: missing"):
        ViewTable.open(str(copied))


@pytest.mark.parametrize("form", list(view_files.CODECS))
@pytest.mark.parametrize("damage", [b"", b"xyz", 0.5])
def test_a_stored_view_that_does_not_decode_is_named(form, damage):
    whole = view_files.encode_view(shown(0, 0).transpose(1, 2, 0).copy(), form)
    data = whole[: int(len(whole) * damage)] if isinstance(damage, float) else damage
    with pytest.raises(InputError, match="image 'k' does not decode"):
        decode_view(data, form, 32, key="k")
    with pytest.raises(InputError, match="image 'k' does not decode"):
        decode_view(whole, form, 48, key="k")


def test_an_audit_renders_again(root):
    result = audit.run(
        AuditConfig(table=str(root / "views"), images=str(root / "images"), samples=30)
    )
    assert (result.kind, result.samples) == ("view_table", 30)
    assert "30 views rendered again" in result.summary()
    result = audit.run(AuditConfig(table=str(root / "views")))
    assert "no views rendered again (that needs --images)" in result.summary()


def test_pixels_that_are_not_the_views_are_found_though_every_hash_is_right(
    root, tmp_path, monkeypatch
):
    real = view_files.encode_view
    monkeypatch.setattr(render_files, "encode_view", lambda pixels, form: real(255 - pixels, form))
    table = write_views(ImageTable.open(str(root / "images")), tmp_path / "wrong", policy=POLICY)
    monkeypatch.undo()
    with pytest.raises(StageFailed, match="pixels differ from those rendered now"):
        audit.run(AuditConfig(table=table, images=str(root / "images"), samples=5))


def test_equal_work_gives_equal_bytes(root, tmp_path):
    write_views(
        ImageTable.open(str(root / "images")), tmp_path / "again", num_views=3, policy=POLICY
    )
    names = sorted(path.name for path in (root / "views").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (root / "views" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
