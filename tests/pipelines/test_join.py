"""Several image tables as one: rows, classes and tokens are theirs, and nothing is copied."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest

from pipelines import audit, evaluate, join, pretrain, storage
from pipelines.config.audit import AuditConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.join import JoinConfig
from pipelines.config.protocol import ProtocolConfig
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.evaluation.labelled_images import read_labelled
from pipelines.reading.encoded_rows import open_training_tables
from pipelines.tables import image_files, image_table
from pipelines.tables.image_table import ImageTable
from pipelines.tables.open_parts import OpenParts
from pipelines.tables.token_table import TokenTable
from pipelines.tokenization.reuse import Origins, older_tables
from tests.chaos import world
from tests.pipelines.pretrain_fixtures import (
    make_tables,
    per_step,
    small_config,
    weight_bytes,
    write_tokens,
)


def joined(*images, output, **changes):
    tracking = TrackingConfig(enabled=False)
    values = {"images": [str(uri) for uri in images], "output": str(output), "tracking": tracking}
    return join.run(JoinConfig(**values | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images 0 to 39 with classes a, b, c; 30 to 59 with c, d, a; both as one."""
    root = tmp_path_factory.mktemp("joined")
    world.make_images(str(root / "a"), count=40, parts=2)
    world.make_images(
        str(root / "b"), count=60, keep=range(30, 60), parts=1, class_names=["c", "d", "a"]
    )
    joined(root / "a", root / "b", output=root / "ab")
    return root


def test_rows_follow_each_other_and_classes_are_matched_by_name(root):
    a, b, ab = (ImageTable.open(str(root / name)) for name in ("a", "b", "ab"))
    assert [path.name for path in (root / "ab").iterdir()] == ["manifest.json"]
    assert ab.num_rows == 70
    assert ab.class_names == ["a", "b", "c", "d"]
    columns = ["key", "image", "digest", "height", "group"]
    there = pa.concat_tables([a.read_rows(0, 40, columns), b.read_rows(0, 30, columns)])
    assert ab.read_rows(0, 70, columns).equals(there)
    names = [table.class_names[label] for table in (a, b) for label in table.labels()]
    assert [ab.class_names[label] for label in ab.labels()] == names
    assert ab.read_rows(35, 45).schema == a.read_rows(0, 1).schema
    again = pickle.loads(pickle.dumps(ab))
    assert again.read_row_group(len(a.row_groups), ["key"])["key"][0].as_py() == "000030.jpg"
    ab.check_parts()


def test_images_that_are_there_twice_are_said(root, tmp_path):
    result = joined(root / "a", root / "b", output=root / "ab")
    assert result.num_repeated == 10
    assert "70 images of 2 tables, 4 classes; 10 rows repeat an image" in result.summary()
    # The same command finds it; another table is not put in its place.
    with pytest.raises(InputError, match="another run has just finished a table there"):
        joined(root / "b", root / "a", output=root / "ab")


def test_a_table_joined_of_a_joined_one_is_that_of_all_of_them(root, tmp_path):
    world.make_images(
        str(tmp_path / "c"), count=80, keep=range(60, 80), parts=2, class_names=["d", "e"]
    )
    at_once = joined(root / "a", root / "b", tmp_path / "c", output=tmp_path / "abc")
    in_turns = joined(root / "ab", tmp_path / "c", output=tmp_path / "ab+c")
    assert in_turns.fingerprint == at_once.fingerprint
    tables = [ImageTable.open(str(tmp_path / name)) for name in ("abc", "ab+c")]
    assert tables[0].read_rows(0, 90).equals(tables[1].read_rows(0, 90))
    assert tables[0].class_names == ["a", "b", "c", "d", "e"]


def test_unlabelled_tables_join_labelled_ones(root, tmp_path):
    world.make_images(str(tmp_path / "bare"), count=70, keep=range(60, 70), parts=1, class_names=[])
    joined(tmp_path / "bare", root / "b", output=tmp_path / "both")
    labels = ImageTable.open(str(tmp_path / "both")).labels()
    assert (labels[:10] == -1).all()
    assert set(labels[10:]) == {0, 1, 2}


def test_the_fingerprint_binds_the_labels(root):
    path = root / "ab" / "manifest.json"
    manifest = json.loads(path.read_text())
    for field, value in (("labels", [1, 0, 2]), ("num_parts", 3)):
        changed = json.loads(path.read_text())
        changed["tables"][0][field] = value
        with pytest.raises((InputError, ValueError)):
            opened_from(root, changed)
    older = {name: value for name, value in manifest.items() if name != "tables"}
    for version in (1, 2):
        with pytest.raises(InputError, match="uri"):
            opened_from(root, older | {"schema_version": version})
    assert manifest["schema_version"] == 2  # what readers of version 1 refuse


def opened_from(root, manifest):
    folder = root / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return ImageTable.open(str(folder))


def test_a_table_given_twice_is_refused(root, tmp_path):
    for images in ([root / "a", root / "a"], [root / "ab", root / "b"], []):
        with pytest.raises(InputError, match="there twice or is the output"):
            joined(*images, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_something_else_is_refused(root, tmp_path):
    (tmp_path / "x/_lease").mkdir(parents=True)
    (tmp_path / "x/_lease/000001-1.json").touch()  # of a prepare that has written nothing yet
    with pytest.raises(
        InputError, match=r"holds other files, the first is '_lease/000001-1\.json'"
    ):
        joined(root / "a", root / "b", output=tmp_path / "x")
    assert not (tmp_path / "x/manifest.json").exists()


def test_no_secret_gets_into_the_manifest(root, tmp_path, monkeypatch):
    for uri in ("ftp://me:hunter2@host/a", "s3://bucket/a?secret_key=hunter2"):
        monkeypatch.setattr(join.ImageParts, "open", lambda _: pytest.fail("opened it"))
        with pytest.raises(InputError, match="by the store's variables or profile") as caught:
            joined(uri, root / "b", output=tmp_path / "x")
        assert "hunter2" not in str(caught.value)


def test_an_audit_reads_the_parts_where_they_are(root, tmp_path):
    assert audit.run(AuditConfig(table=str(root / "ab"))).num_files == 3
    for name in "ab":
        shutil.copytree(root / name, tmp_path / name)
    joined(tmp_path / "a", tmp_path / "b", output=tmp_path / "ab")
    part = tmp_path / "b" / "part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 255
    part.write_bytes(data)
    with pytest.raises(StageFailed, match=r"001-part-00000\.parquet: hash .* != "):
        audit.run(AuditConfig(table=str(tmp_path / "ab")))
    part.unlink()
    table = ImageTable.open(str(tmp_path / "ab"))
    with pytest.raises(InputError, match=r"b/part-00000\.parquet is missing .1 of 3 parts"):
        table.check_parts()


def test_a_part_that_has_gone_is_joined_again(root, tmp_path, monkeypatch):
    shutil.copytree(root / "b", tmp_path / "b")
    joined(root / "a", tmp_path / "b", output=tmp_path / "ab")
    (tmp_path / "b/part-00000.parquet").unlink()
    monkeypatch.setattr(image_files, "_OPEN", OpenParts(1))  # a process that has not read it
    table = ImageTable.open(str(tmp_path / "ab"))
    with pytest.raises(InputError, match=r"b/part.* delete the manifest of .*/ab and `beit join`"):
        table.read_rows(60, 61)


def test_rows_without_a_group_are_grouped_by_their_image(root, tmp_path):
    world.make_images(str(tmp_path / "c"), count=40, parts=1, side=56)  # keys of "a", other images
    joined(root / "a", tmp_path / "c", output=tmp_path / "ac")
    protocol = ProtocolConfig(num_folds=2)
    assert len(read_labelled(str(tmp_path / "ac"), protocol)) == 80
    held_out = ImageTable.open(str(tmp_path / "ac")).held_out(0.5)
    assert (held_out[:40] != held_out[40:]).any()
    # Images 30 to 39 are rows of both tables.
    assert len(read_labelled(str(root / "ab"), protocol)) == 60
    held_out = ImageTable.open(str(root / "ab")).held_out(0.5)
    np.testing.assert_array_equal(held_out[30:40], held_out[40:50])


def test_tokens_are_those_of_the_tables(root):
    tokenizer = world.make_tokenizer(str(root / "tokenizer"))
    tables = {name: ImageTable.open(str(root / name)) for name in ("a", "b", "ab")}
    for name, table in tables.items():
        world.write_tokens(table, tokenizer, str(root / f"{name}-tokens"))
    tokens = {name: TokenTable.open(str(root / f"{name}-tokens")) for name in tables}
    assert tokens["ab"].file_name(0) == "000-part-00000-00000000-00000020.parquet"
    both = np.concatenate([tokens["a"].read_rows(0, 40)[1], tokens["b"].read_rows(0, 30)[1]])
    np.testing.assert_array_equal(tokens["ab"].read_rows(0, 70)[1], both)
    # None of them would be computed where those of both tables are reused.
    config = TokenizeConfig(
        images=str(root / "ab"),
        tokenizer=tokenizer,
        output="o",
        reuse=[tokens["a"].uri, tokens["b"].uri],
        reuse_images=[tables["a"].uri, tables["b"].uri],
    )
    older = older_tables(config, tables["ab"], tokens["ab"].identity.to_dict(), {})
    assert Origins(tables["ab"], older).num_reused == 70
    # Training reads row by row what it would read of each.
    data = open_training_tables(str(root / "ab"), [tokens["ab"].uri], labelled=True)
    alone = open_training_tables(str(root / "b"), [tokens["b"].uri], labelled=True)
    rows, same = data.read(35, 70, epoch=1), alone.read(0, 30, epoch=1)
    assert rows.images[5:] == same.images
    np.testing.assert_array_equal(rows.views[5:], same.views)
    np.testing.assert_array_equal(rows.token_ids[5:], same.token_ids)


def halves(whole, root):
    """The parts of a table as tables of their own below `root`."""
    uris = [storage.join(root, f"half-{number}") for number in range(len(whole.parts))]
    for number, (uri, part) in enumerate(zip(uris, whole.parts, strict=True)):
        storage.write_bytes(
            storage.join(uri, part.name), storage.read_bytes(whole.part_uri(number))
        )
        image_table.commit_manifest(
            uri, parts=[part], class_names=whole.class_names, source={}, options={}, rejected={},
            num_items=part.rows,
        )  # fmt: skip
    return uris


def test_training_and_evaluation_are_those_of_one_table_with_these_rows(tmp_path):
    tables = make_tables(tmp_path)
    whole = ImageTable.open(tables[0])
    joined(*halves(whole, str(tmp_path)), output=tmp_path / "both")
    both = ImageTable.open(str(tmp_path / "both"))
    write_tokens(str(tmp_path / "both-tokens"), both)
    optim = {"steps": 6, "warmup_steps": 1}
    runs = [
        pretrain.run(small_config(given, tmp_path / name, optim=optim)).run_uri
        for name, given in (("one", tables), ("two", (both.uri, str(tmp_path / "both-tokens"))))
    ]
    assert weight_bytes(runs[0]) == weight_bytes(runs[1])
    assert per_step(runs[0]) == per_step(runs[1])
    options = {"baselines": False, "attentive": False, "num_folds": 2}
    found = [
        evaluate.run(
            EvaluateConfig(
                run=runs[0],
                images=images,
                output=str(tmp_path / name),
                tracking=TrackingConfig(enabled=False),
                **options,
            )
        )
        for name, images in (("alone", tables[0]), ("joined", both.uri))
    ]
    assert [one.num_images for one in found] == [96, 96]
    assert found[0].class_names == found[1].class_names
    assert found[0].scores.keys() == found[1].scores.keys()


def test_a_run_names_the_tables(root, tmp_path, mlflow_uri):
    from mlflow import MlflowClient

    tracking = TrackingConfig(uri=mlflow_uri, experiment="x")
    result = joined(root / "a", root / "b", output=tmp_path / "ab", tracking=tracking)
    client = MlflowClient(mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    fingerprints = [ImageTable.open(str(root / name)).fingerprint for name in "ab"]
    assert run.data.tags["beit.input.image_table"].split(",") == fingerprints
    assert run.data.tags["beit.output.image_table"] == result.fingerprint
    assert result.fingerprint == ImageTable.open(str(root / "ab")).fingerprint
    assert image_table.JOINED_VERSION == 2
