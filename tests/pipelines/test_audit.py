import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import audit, storage
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tables import image_table
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_files import encode_file
from pipelines.tables.token_table import TokenTable
from pipelines.tables.unit_files import file_name
from tests.chaos import world


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Images, tokenizer and their token table, made without Ray."""
    root = tmp_path_factory.mktemp("sound")
    images = ImageTable.open(world.make_images(str(root / "images"), count=120))
    world.make_tokenizer(str(root / "tokenizer"))
    world.write_tokens(images, str(root / "tokenizer"), str(root / "tokens"))
    return root


@pytest.fixture
def copied(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def of_tokens(root, **changes):
    values = {
        "table": str(root / "tokens"),
        "images": str(root / "images"),
        "tokenizer": str(root / "tokenizer"),
        "samples": 40,
    }
    return AuditConfig(**values | changes)


def test_sound_tables_pass(sound):
    result = audit.run(of_tokens(sound, samples=200))
    assert (result.num_files, result.samples, result.token_agreement) == (3, 200, 1.0)
    assert "sound. 3 files" in result.summary()
    result = audit.run(AuditConfig(table=str(sound / "images")))
    assert (result.kind, result.num_files, result.samples) == ("image_table", 3, 120)
    assert audit.run(of_tokens(sound, share=0.4)).num_files == 1
    assert audit.run(of_tokens(sound, images="", tokenizer="")).samples == 0


def test_each_row_group_of_the_images_is_read_once(sound, monkeypatch):
    """However many rows of it are looked at again."""
    reads, real = [], image_table.read_row_groups

    def read(uri, part, indices, columns=None):
        reads.extend((part.name, index) for index in indices)
        return real(uri, part, indices, columns)

    monkeypatch.setattr(image_table, "read_row_groups", read)
    groups = ImageTable.open(str(sound / "images")).row_groups
    for config in (AuditConfig(table=str(sound / "images")), of_tokens(sound, samples=200)):
        reads.clear()
        assert audit.run(config).samples >= 120 > len(groups)
        assert len(reads) == len(set(reads)) <= len(groups)


def rewrite(root, change, *, honest_manifest):
    """Changes keys or tokens of the second token file; `honest_manifest` also hides it there."""
    table = TokenTable.open(str(root / "tokens"))
    rows = table.file_rows(1)
    keys, ids = table.read_rows(rows.start, rows.stop)
    keys, ids = change(list(keys), ids.copy())
    data = encode_file(keys, ids, table.identity)
    if honest_manifest:
        write_honestly(root, data)
    else:
        (root / "tokens" / table.file_name(1)).write_bytes(data)


def write_honestly(root, data):
    """Another second file, and the manifest that has it."""
    table = TokenTable.open(str(root / "tokens"))
    (root / "tokens" / table.file_name(1)).write_bytes(data)
    manifest = dict(table.manifest)
    manifest.pop("fingerprint")
    manifest["files"]["size"][1] = len(data)
    manifest["files"]["hash"][1] = storage.digest(data)
    manifest["fingerprint"] = storage.fingerprint(manifest)
    storage.write_json(str(root / "tokens" / "manifest.json"), manifest)


def one_token(keys, ids):
    ids[7, 1, 3] ^= 1
    return keys, ids


def one_key(keys, ids):
    keys[5] = "other.jpg"
    return keys, ids


def test_a_changed_token_is_named(copied):
    rewrite(copied, one_token, honest_manifest=False)
    with pytest.raises(StageFailed) as caught:
        audit.run(of_tokens(copied))
    message = str(caught.value)
    assert "part-00001-00000000-00000040.parquet: " in message
    assert "(file != manifest)" in message
    assert "row 47: token_ids: view 1, position 3" in message


@pytest.mark.parametrize("changes", [{}, {"tokenizer": ""}])
def test_changed_grey_levels_are_named(copied, changes):
    table = TokenTable.open(str(copied / "tokens"))
    rows = table.file_rows(1)
    keys, ids, levels = table.read_with_levels(rows.start, rows.stop)
    write_honestly(copied, encode_file(keys, ids, table.identity, (levels ^ 1).astype(np.uint8)))
    with pytest.raises(StageFailed, match=r"row \d+: grey_levels: \d+ != \d+ \(table != comp"):
        audit.run(of_tokens(copied, samples=50, **changes))


def test_a_changed_key_is_named(copied):
    rewrite(copied, one_key, honest_manifest=False)
    with pytest.raises(StageFailed, match=r"row 45: key 'other\.jpg' != '000045\.jpg'"):
        audit.run(of_tokens(copied))


def test_tokens_of_other_pixels_are_found_though_every_hash_is_right(copied):
    def noise(keys, ids):
        return keys, np.random.default_rng(0).integers(0, 64, ids.shape).astype(np.uint16)

    rewrite(copied, noise, honest_manifest=True)
    assert audit.run(of_tokens(copied, images="", tokenizer="")).num_files == 3
    with pytest.raises(StageFailed, match=r"token_ids: view \d: \d+ of 16 tokens differ"):
        audit.run(of_tokens(copied))
    assert audit.run(of_tokens(copied, min_agreement=0.1)).token_agreement < 1


def test_views_that_cannot_be_compared_are_findings(copied):
    part = next((copied / "images").glob("part-*.parquet"))
    part.unlink()
    with pytest.raises(StageFailed, match=rf"row \d+: .*{part.name}"):
        audit.run(of_tokens(copied, samples=100))


def test_missing_truncated_and_foreign_files_are_named(copied):
    (copied / "tokens" / "part-00000-00000000-00000040.parquet").rename(
        copied / "tokens" / "part-00009-00000000-00000040.parquet"
    )
    truncated = copied / "tokens" / "part-00002-00000000-00000040.parquet"
    truncated.write_bytes(truncated.read_bytes()[:-10])
    with pytest.raises(StageFailed, match=r"part-00000-00000000-00000040\.parquet: missing"):
        audit.run(of_tokens(copied))
    first = copied / "tokens" / "part-00009-00000000-00000040.parquet"
    shutil.copy(first, copied / "tokens" / "part-00000-00000000-00000040.parquet")
    with pytest.raises(StageFailed) as caught:
        audit.run(of_tokens(copied))
    message = str(caught.value)
    assert "part-00002-00000000-00000040.parquet: size" in message
    assert "part-00002-00000000-00000040.parquet: not a whole file of 40 rows" in message
    assert "part-00009-00000000-00000040.parquet: not in the manifest" in message


def test_another_tokenizer_or_image_table_is_refused(copied):
    world.make_tokenizer(str(copied / "other"), seed=1)
    with pytest.raises(InputError, match="tokenizer_fingerprint"):
        audit.run(of_tokens(copied, tokenizer=str(copied / "other")))
    world.make_images(str(copied / "few"), count=30)
    with pytest.raises(InputError, match="image_fingerprint"):
        audit.run(of_tokens(copied, images=str(copied / "few")))
    with pytest.raises(InputError, match="no finished table"):
        audit.run(AuditConfig(table=str(copied)))
    with pytest.raises(InputError, match="share"):
        of_tokens(copied, share=0.0)


def test_a_flipped_bit_in_an_image_is_named(copied):
    path = copied / "images" / "part-00001.parquet"
    image = pq.read_table(path).column("image")[9].as_py()
    data = path.read_bytes()
    position = data.index(image) + len(image) // 2
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    with pytest.raises(StageFailed) as caught:
        audit.run(AuditConfig(table=str(copied / "images"), samples=5))
    assert "part-00001.parquet: hash" in str(caught.value)
    assert "part-00001.parquet: row 9: image does not match its digest" in str(caught.value)


def test_wrong_sides_are_found_though_every_hash_is_right(copied):
    path = copied / "images" / "part-00002.parquet"
    table = pq.read_table(path)
    heights = table.column("height").to_numpy() + 1
    changed = table.set_column(
        table.column_names.index("height"), table.schema.field("height"), [heights]
    )
    groups = json.loads((copied / "images" / "manifest.json").read_text())["parts"][2]["row_groups"]
    with pq.ParquetWriter(path, changed.schema) as writer:
        start = 0
        for rows in groups:
            writer.write_table(changed.slice(start, rows), row_group_size=rows)
            start += rows
    manifest = json.loads((copied / "images" / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["parts"][2] |= {"bytes": len(data), "hash": storage.digest(data)}
    storage.write_json(str(copied / "images" / "manifest.json"), manifest)
    with pytest.raises(StageFailed, match=r"part-00002\.parquet: row \d+: height \d+ != \d+"):
        audit.run(dataclasses.replace(AuditConfig(table=str(copied / "images")), samples=120))


def test_file_names_are_those_of_the_contract():
    assert file_name("part-00003.parquet", 512, 1024) == "part-00003-00000512-00001024.parquet"
