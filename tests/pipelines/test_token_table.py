import concurrent.futures
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit.views import ViewPolicy
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tables import token_files, token_table, unit_files
from pipelines.tables.token_files import Identity, encode_file
from pipelines.tables.token_table import MISSING, TokenTable
from pipelines.tables.unit_files import RejectedUnit, UnitFile, file_name

PART_ROWS = [700, 300, 41]
NUM_ROWS = sum(PART_ROWS)


class Images:
    uri = "/images"
    fingerprint = "f" * 32
    num_rows = NUM_ROWS


def make_identity(**changes):
    values = {
        "image_fingerprint": Images.fingerprint,
        "num_rows": NUM_ROWS,
        "tokenizer_fingerprint": "a" * 32,
        "vocab_size": 512,
        "grid_size": (4, 4),
        "image_size": 32,
        "interpolation": "lanczos",
        "policy": ViewPolicy(seed=3).to_dict(),
        "views": (0, 2),
        "device": "cpu",
        "precision": "float32",
        "batch_size": 16,
    }
    return Identity(**values | changes)


def all_tokens(views=2):
    return np.random.default_rng(0).integers(0, 512, (NUM_ROWS, views, 16)).astype(np.uint16)


def write_table(uri, identity=None, *, skip=(), rows_per_unit=300):
    """A table of PART_ROWS whose units are `rows_per_unit` rows; `skip` are rejected units."""
    identity = identity or make_identity()
    tokens, base = all_tokens(identity.num_views), 0
    files, rejected = [], []
    names = [f"part-{index:05d}.parquet" for index in range(len(PART_ROWS))]
    for part, rows in enumerate(PART_ROWS):
        for start in range(0, rows, rows_per_unit):
            stop = min(rows, start + rows_per_unit)
            if (part, start) in skip:
                rejected.append(RejectedUnit(part=part, start=start, stop=stop, reason="boom"))
                continue
            keys = [f"k{row:06d}" for row in range(base + start, base + stop)]
            data = encode_file(keys, tokens[base + start : base + stop], identity)
            storage.write_bytes(storage.join(uri, file_name(names[part], start, stop)), data)
            files.append(
                UnitFile(
                    part=part, start=start, stop=stop, size=len(data), hash=storage.digest(data)
                )
            )
        base += rows
    manifest = token_table.build_manifest(
        identity=identity,
        part_names=names,
        part_rows=PART_ROWS,
        files=files,
        rejected=rejected,
        rows_per_unit=rows_per_unit,
        libraries={"torch": "2"},
    )
    storage.write_json(storage.join(uri, "manifest.json"), manifest)
    return manifest


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("tokens"))
    write_table(uri)
    return TokenTable.open(uri)


def test_what_is_written_is_read(table):
    keys, token_ids = table.read_rows(0, NUM_ROWS)
    assert keys == [f"k{row:06d}" for row in range(NUM_ROWS)]
    assert token_ids.dtype == np.uint16
    np.testing.assert_array_equal(token_ids, all_tokens())
    assert table.views == range(2)
    assert table.grid_size == (4, 4)
    assert table.vocab_size == 512
    assert table.policy == ViewPolicy(seed=3)
    assert table.num_missing == 0
    assert table.file_name(0) == "part-00000-00000000-00000300.parquet"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, NUM_ROWS), st.integers(0, NUM_ROWS))
def test_any_row_range_spans_files(table, one, other):
    start, stop = sorted((one, other))
    keys, token_ids = table.read_rows(start, stop)
    assert keys == [f"k{row:06d}" for row in range(start, stop)]
    np.testing.assert_array_equal(token_ids, all_tokens()[start:stop])


def test_a_range_outside_the_table_is_refused(table):
    with pytest.raises(IndexError, match=str(NUM_ROWS)):
        table.read_rows(0, NUM_ROWS + 1)


def test_threads_read_the_same(table):
    starts = range(0, NUM_ROWS - 50, 13)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for start, (_, ids) in zip(
            starts, pool.map(lambda row: table.read_rows(row, row + 50), starts), strict=True
        ):
            np.testing.assert_array_equal(ids, all_tokens()[start : start + 50])


def test_equal_tables_have_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_table(str(tmp_path / name))
    first = sorted((tmp_path / "a").iterdir())
    assert len(first) == 6
    for file in first:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_manifest_is_canonical_json(tmp_path):
    manifest = write_table(str(tmp_path))
    assert unit_files.encode_manifest(manifest) == storage.canonical_json(manifest)
    content = {name: value for name, value in manifest.items() if name != "fingerprint"}
    assert manifest["fingerprint"] == storage.fingerprint(content)


def test_an_unfinished_table_is_none(tmp_path):
    write_table(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="no finished token table"):
        TokenTable.open(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_fingerprint", "0" * 32),
        ("tokenizer_fingerprint", "0" * 32),
        ("vocab_size", 513),
        ("grid_size", [2, 8]),
        ("views", [1, 3]),
        ("precision", "float16"),
        ("num_rows", NUM_ROWS + 1),
        ("fingerprint", "0" * 32),
    ],
)
def test_an_altered_field_is_named_with_both_values(tmp_path, field, value):
    manifest = write_table(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(InputError) as caught:
        TokenTable.open(str(tmp_path))
    message = str(caught.value)
    assert field in message
    assert repr(value) in message
    assert repr(manifest[field]) in message


def test_an_altered_policy_or_file_hash_is_found(tmp_path):
    manifest = write_table(str(tmp_path))
    policy = manifest["policy"] | {"seed": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"policy": policy}))
    with pytest.raises(InputError, match=r"policy\.seed: 4 != 3"):
        TokenTable.open(str(tmp_path))
    files = manifest["files"] | {"hash": ["0" * 32, *manifest["files"]["hash"][1:]]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    with pytest.raises(InputError, match="fingerprint"):
        TokenTable.open(str(tmp_path))


def test_what_does_not_fit_is_named(table):
    table.check_compatible(
        Images(),
        grid_size=(4, 4),
        vocab_size=512,
        tokenizer_fingerprint="a" * 32,
        policy=ViewPolicy(seed=3),
    )
    other = Images()
    other.fingerprint = "e" * 32
    with pytest.raises(InputError, match=f"image_fingerprint: '{'f' * 32}' != '{'e' * 32}'"):
        table.check_compatible(other)
    with pytest.raises(InputError, match=r"grid_size: \[4, 4\] != \[14, 14\]"):
        table.check_compatible(Images(), grid_size=(14, 14))
    with pytest.raises(InputError, match="vocab_size: 512 != 8192"):
        table.check_compatible(Images(), vocab_size=8192)
    with pytest.raises(InputError, match="tokenizer_fingerprint"):
        table.check_compatible(Images(), tokenizer_fingerprint="b" * 32)
    with pytest.raises(InputError, match=r"policy\.seed: 3 != 5"):
        table.check_compatible(Images(), policy=ViewPolicy(seed=5))


def test_rows_of_a_quarantined_unit_are_marked_and_refused(tmp_path):
    write_table(str(tmp_path), skip={(0, 300)})
    table = TokenTable.open(str(tmp_path))
    assert table.num_missing == 300
    keys, token_ids = table.read_rows(290, 610)
    assert keys[9:11] == ["k000299", ""]
    assert (token_ids[10:310] == MISSING).all()
    np.testing.assert_array_equal(token_ids[310:], all_tokens()[600:610])
    with pytest.raises(InputError, match="rejected: 300 of 1041 rows"):
        table.check_compatible(Images())
    table.check_compatible(Images(), allow_missing=True)


def test_tables_of_further_views_go_together(tmp_path):
    for name, changes in {
        "first": {},
        "more": {"views": (2, 3)},
        "same": {},
        "other": {"views": (2, 3), "tokenizer_fingerprint": "b" * 32},
    }.items():
        write_table(str(tmp_path / name), make_identity(**changes))
    tables = {path.name: TokenTable.open(str(path)) for path in tmp_path.iterdir()}
    token_table.check_together([tables["first"], tables["more"]])
    with pytest.raises(InputError, match="view 0 is in both"):
        token_table.check_together([tables["first"], tables["same"]])
    with pytest.raises(InputError, match="tokenizer_fingerprint"):
        token_table.check_together([tables["first"], tables["other"]])


def test_tokens_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="not uint16"):
        encode_file(["a"], np.zeros((1, 2, 15), np.uint16), make_identity())
    with pytest.raises(ValueError, match="not uint16"):
        encode_file(["a"], np.zeros((1, 2, 16), np.int64), make_identity())


def test_grey_levels_are_read_where_a_file_has_them(tmp_path):
    identity = make_identity()
    write_table(str(tmp_path), identity)
    table = TokenTable.open(str(tmp_path))
    keys, ids = table.read_rows(0, 300)
    levels = np.random.default_rng(0).integers(0, 256, (300, 2)).astype(np.uint8)
    data = encode_file(keys, ids, identity, levels)
    assert token_files.check_file(identity, data, 300) == (True, None)
    (tmp_path / table.file_name(0)).write_bytes(data)
    token_files._footer.cache_clear()
    found_keys, found_ids, found = table.read_with_levels(250, 350)
    np.testing.assert_array_equal(found[:50], levels[250:])
    assert (found[50:] == token_files.UNKNOWN_LEVEL).all()
    np.testing.assert_array_equal(found_ids, all_tokens()[250:350])
    assert found_keys == table.read_rows(250, 350)[0]
    # Tables of an earlier release have none, and say so by their version.
    assert table.manifest["schema_version"] == 2
    old = {name: value for name, value in table.manifest.items() if name != "fingerprint"}
    old |= {"schema_version": 1}
    storage.write_json(
        str(tmp_path / "manifest.json"), old | {"fingerprint": storage.fingerprint(old)}
    )
    assert TokenTable.open(str(tmp_path)).num_rows == NUM_ROWS


def test_a_view_takes_less_than_two_bytes_a_token():
    identity = make_identity(vocab_size=8192, grid_size=(14, 14), views=(0, 4))
    ids = np.random.default_rng(0).integers(0, 8192, (1024, 4, 196)).astype(np.uint16)
    data = encode_file([f"{row:08d}" for row in range(1024)], ids, identity)
    assert len(data) / (1024 * 4) < 392


def test_a_damaged_file_is_named_when_its_rows_are_read(tmp_path):
    write_table(str(tmp_path))
    table = TokenTable.open(str(tmp_path))
    path = tmp_path / table.file_name(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    table.read_rows(0, 300)
    with pytest.raises(InputError, match=f"{table.file_name(1)}: damaged"):
        table.read_rows(250, 350)
    path.unlink()
    (tmp_path / table.file_name(2)).unlink()
    with pytest.raises(InputError, match=f"{table.file_name(2)}: missing"):
        table.read_rows(600, 650)
