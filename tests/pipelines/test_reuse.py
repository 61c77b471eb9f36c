"""Tokens of older tables: which rows have them, what is refused, and that copies are exact."""

import dataclasses
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from beit.views import ViewPolicy
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.errors import InputError
from pipelines.tables import digests, token_files, tokenizer_store
from pipelines.tables.image_table import ImageParts
from pipelines.tables.token_files import UNKNOWN_LEVEL
from pipelines.tables.token_table import MISSING, TokenTable
from pipelines.tokenization import reuse, work
from pipelines.tokenization.reuse import Older, Origins, copied_tokens, older_tables
from pipelines.tokenization.work import Unit, encode_rendered, fill_tokens, render_unit
from tests.chaos import world


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images 0 to 89; older tables of 0 to 39, under other names, and of 30 to 59."""
    root = tmp_path_factory.mktemp("grown")
    world.make_images(str(root / "images"), count=90, parts=4)
    world.make_images(str(root / "a"), count=40, parts=2, prefix="z/")
    world.make_images(str(root / "b"), count=60, keep=range(30, 60), parts=1)
    world.make_tokenizer(str(root / "tokenizer"))
    for name in "ab":
        images = ImageParts.open(str(root / name))
        world.write_tokens(images, str(root / "tokenizer"), str(root / f"{name}-tokens"))
    return root


def config_of(root, **changes):
    values = {
        "images": str(root / "images"),
        "tokenizer": str(root / "tokenizer"),
        "output": str(root / "tokens"),
        "reuse": [str(root / "a-tokens"), str(root / "b-tokens")],
        "reuse_images": [str(root / "b"), str(root / "a")],
    }
    return TokenizeConfig(**values | changes)


def opened(root, config=None, **identity):
    images = ImageParts.open(str(root / "images"))
    same = TokenTable.open(str(root / "a-tokens")).identity
    wanted = dataclasses.replace(
        same, image_fingerprint=images.fingerprint, num_rows=images.num_rows, **identity
    )
    return images, wanted, older_tables(config or config_of(root), images, wanted.to_dict(), {})


def origin_of(origins, rows):
    """Every row's origin, from the runs of units of 7 rows."""
    found = np.full(rows, -1)
    for start in range(0, rows, 7):
        for row, origin, count in origins.runs(start, min(start + 7, rows)):
            found[start + row : start + row + count] = np.arange(origin, origin + count)
    return found.tolist()


@pytest.mark.parametrize("bucket_rows", [2**22, 7])
def test_origins_are_those_of_a_search_through_all_digests(root, bucket_rows, monkeypatch):
    monkeypatch.setattr(digests, "BUCKET_ROWS", bucket_rows)
    images, _, older = opened(root)
    origins = Origins(images, older)
    first_of = {}
    for table in older:
        for row, digest in enumerate(
            ImageParts.open(table.images).read_rows(0, table.rows)["digest"]
        ):
            first_of.setdefault(digest.as_py(), table.first + row)
    names = images.read_rows(0, 90)["digest"].to_pylist()
    assert origin_of(origins, 90) == [first_of.get(digest, -1) for digest in names]
    assert origins.num_reused == 60
    # A run never goes over the end of a table.
    assert origins.runs(0, 90) == [(0, 0, 40), (40, 51, 20)]


def test_rows_of_rejected_units_are_not_reused(root):
    table = TokenTable.open(str(root / "a-tokens"))
    assert table.have_file(np.arange(40)).all()
    # Its first file, of rows 0 to 19, was never made.
    files = {name: column[1:] for name, column in table.manifest["files"].items()}
    less = TokenTable(table.uri, table.manifest | {"files": files})
    assert less.have_file(np.arange(40)).tolist() == [False] * 20 + [True] * 20
    files = {name: column[:1] for name, column in table.manifest["files"].items()}
    less = TokenTable(table.uri, table.manifest | {"files": files})
    assert less.have_file(np.arange(40)).tolist() == [True] * 20 + [False] * 20


def test_the_driver_holds_a_bucket_and_not_all_digests(monkeypatch):
    rows, parts = 100_000, 40
    monkeypatch.setattr(digests, "BUCKET_ROWS", 10_000)
    content = np.random.default_rng(0).bytes(16 * rows)

    def iter_parts(columns):
        for part in range(parts):
            piece = content[part * 16 * rows // parts : (part + 1) * 16 * rows // parts]
            column = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(16), rows // parts, [None, pa.py_buffer(piece)]
            )
            yield pa.table({"digest": column})

    images = SimpleNamespace(num_rows=rows, iter_parts=iter_parts)
    tokens = SimpleNamespace(have_file=lambda numbers: numbers % 2 == 0)
    monkeypatch.setattr(reuse, "_opened", lambda older: (images, tokens))
    older = Older(tokens="t", images="i", first=0, rows=rows)
    tracemalloc.start()
    origins = Origins(images, [older])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert origins.num_reused == rows // 2
    assert origins.runs(10, 13) == [(0, 10, 1), (2, 12, 1)]
    assert peak < rows * digests.RECORD.itemsize / 2, peak


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": ViewPolicy(seed=9).to_dict()}, r"policy\.seed: 0 != 9"),
        ({"tokenizer_fingerprint": "other"}, "tokenizer_fingerprint: .* != 'other'"),
        ({"precision": "float16"}, "precision: 'float32' != 'float16'"),
        ({"device": "cuda"}, "device: 'cpu' != 'cuda'"),
        ({"batch_size": 64}, "batch_size: 16 != 64"),
        ({"views": (0, 4)}, r"views: \[0, 2\] != \[0, 4\]"),
        ({"image_size": 48}, "image_size: 32 != 48"),
    ],
)
def test_tables_made_otherwise_are_refused_by_field(root, changes, message):
    with pytest.raises(InputError, match=f"reuse = .*a-tokens: {message} .older table"):
        opened(root, **changes)


def test_the_images_of_an_older_table_are_asked_for(root):
    with pytest.raises(InputError, match=r"a-tokens: .* name it with --reuse_images"):
        opened(root, config_of(root, reuse_images=[str(root / "b")]))
    # Tokens of the images themselves need no other table.
    images = ImageParts.open(str(root / "a"))
    identity = TokenTable.open(str(root / "a-tokens")).identity
    config = config_of(root, reuse=[str(root / "a-tokens")], reuse_images=[])
    (older,) = older_tables(config, images, identity.to_dict(), {})
    assert Origins(images, [older]).runs(0, 40) == [(0, 0, 40)]


def test_other_versions_are_said(root, capsys):
    images, identity, _ = opened(root)
    older_tables(config_of(root), images, identity.to_dict(), {"torch": "9.9"})
    assert "made with other versions (torch: None != '9.9')" in capsys.readouterr().err


def test_copied_tokens_are_those_that_would_be_computed(root):
    images, identity, older = opened(root, views=(1, 2))
    origins = Origins(images, older)
    part = images.parts[1]
    unit = Unit(index=0, part=part.to_dict(), start=0, stop=part.rows)
    begin = int(images.part_starts[1])
    reused = dataclasses.replace(unit, reused=origins.runs(begin, begin + part.rows))
    whole = render_unit(images.uri, unit, identity)
    less = render_unit(images.uri, reused, identity, older)
    assert (whole.token_ids == MISSING).all()
    assert len(whole.pixels) == part.rows
    assert len(less.pixels) == 0
    _, a = TokenTable.open(str(root / "a-tokens")).read_rows(begin, 40)
    _, b = TokenTable.open(str(root / "b-tokens")).read_rows(10, begin + part.rows - 30)
    np.testing.assert_array_equal(less.token_ids, np.concatenate([a, b])[:, 1:])
    np.testing.assert_array_equal(less.grey_levels, whole.grey_levels)


@pytest.mark.parametrize("early", [False, True])
def test_copied_rows_among_others_are_not_decoded(root, monkeypatch, early):
    images, identity, older = opened(root)
    unit = Unit(index=0, part=images.parts[0].to_dict(), start=0, stop=images.parts[0].rows)
    tokenizer = tokenizer_store.load(str(root / "tokenizer"))
    whole = render_unit(images.uri, unit, identity)
    expected = encode_rendered(tokenizer, whole.pixels, identity)
    if early:
        real = token_files.levels_of
        monkeypatch.setattr(
            token_files, "levels_of", lambda *table: np.full_like(real(*table), UNKNOWN_LEVEL)
        )
    decoded = []
    rendered = work.render_with_levels
    monkeypatch.setattr(
        work, "render_with_levels", lambda *row, key: decoded.append(key) or rendered(*row, key=key)
    )
    runs = [(2, 2, 3), (9, 9, 1)]
    less = render_unit(images.uri, dataclasses.replace(unit, reused=runs), identity, older)
    assert decoded == [key for row, key in enumerate(whole.keys) if row not in (2, 3, 4, 9)]
    tokens = fill_tokens(less.token_ids, tokenizer, less.pixels, identity, device="cpu")
    np.testing.assert_array_equal(tokens, expected)
    if early:
        assert less.grey_levels is None
    else:
        np.testing.assert_array_equal(less.grey_levels, whole.grey_levels)


def test_scattered_rows_are_read_where_they_are(root):
    images, identity, older = opened(root)
    names = images.read_rows(0, 90)["digest"].to_pylist()
    rows = [39, 3, 3, 70, 55, 0]
    runs = [(0, 39, 1), (1, 3, 1), (2, 3, 1), (4, 41 + 25, 1), (5, 0, 1)]
    ids, levels = copied_tokens(older, runs, [names[row] for row in rows], identity)
    _, a = TokenTable.open(older[0].tokens).read_rows(0, 40)
    _, b = TokenTable.open(older[1].tokens).read_rows(0, 30)
    np.testing.assert_array_equal(ids[[0, 1, 2, 5]], a[[39, 3, 3, 0]])
    np.testing.assert_array_equal(ids[4], b[25])
    assert (ids[3] == MISSING).all()
    assert (levels[[0, 1, 2, 4, 5]] >= 0).all()
    assert (levels[3] == UNKNOWN_LEVEL).all()
    with pytest.raises(InputError, match=r"a-tokens: rows 3 to 4 are not of the images"):
        copied_tokens(older, [(0, 3, 1)], [names[4]], identity)
