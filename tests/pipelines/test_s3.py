"""Storage and the whole chain of artefacts on an S3 server: the same bytes as on local disk."""

import gc
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipelines import audit, pretrain, storage, stores, train_tokenizer
from pipelines.config.audit import AuditConfig
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.errors import StageFailed, StoreError
from pipelines.preparation.sources import open_source
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tokenization.reuse import Origins, older_tables
from pipelines.tokenization.work import Unit, render_unit
from pipelines.training.run_dir import RunDir
from tests.chaos import world
from tests.faulty_proxy import FAULTS, faulty_proxy
from tests.pipelines.pretrain_fixtures import (
    per_step,
    small_config,
    weight_bytes,
    write_images,
    write_tokens,
)
from tests.pipelines.test_join import halves, joined
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table
from tests.s3_server import bucket, s3  # noqa: F401 - fixtures

KEYS = ["a/1.png", "a//2.png", "a/b/3.png", "/4.png", "a/50%25 ü?#.png", "a/x?w=1&v=2", "m/n/5"]


def put(s3, bucket, keys):  # noqa: F811
    for key in keys:
        data = b"" if key.endswith("/") else key.encode()
        s3.client().put_object(Bucket=bucket, Key=key, Body=data)


def test_every_object_is_accounted_for(s3, bucket, tmp_path):  # noqa: F811
    put(s3, bucket, [*KEYS, "m/", "empty/", "m/n/"])
    root = s3.uri(bucket)
    assert [file.path for file in storage.list_files(root)] == sorted(KEYS)
    entries = list(open_source(root).entries())
    assert [entry.path for entry in entries] == sorted(KEYS)
    for name in KEYS:
        assert storage.read_bytes(storage.join(root, name)) == name.encode()
    below = s3.uri(bucket + "//a/")
    assert {file.path for file in storage.list_files(below)} == {
        key[2:] for key in KEYS if key.startswith("a/")
    }
    storage.fetch_dir(s3.uri(bucket, "m"), tmp_path)
    assert (tmp_path / "n" / "5").read_bytes() == b"m/n/5"
    storage.delete_prefix(s3.uri(bucket, "m"))
    storage.delete_prefix(s3.uri(bucket, "a"))
    left = s3.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert [record["Key"] for record in left] == ["/4.png", "empty/"]


def test_other_writers_are_seen_at_once(s3, bucket):  # noqa: F811
    uri = s3.uri(bucket, "x", "y")
    assert not storage.exists(uri) and storage.list_files(s3.uri(bucket, "x")) == []
    put(s3, bucket, ["x/y"])
    assert storage.exists(uri) and len(storage.list_files(s3.uri(bucket, "x"))) == 1
    put(s3, bucket, ["x/y", "x/z"])
    s3.client().delete_object(Bucket=bucket, Key="x/y")
    assert [file.path for file in storage.list_files(s3.uri(bucket, "x"))] == ["z"]
    with pytest.raises(FileNotFoundError, match="x/y"):
        storage.read_bytes(uri)


def test_one_of_many_creates_though_answers_are_lost(s3, bucket):  # noqa: F811
    with faulty_proxy(s3.port, rate=0.3, seed=5, faults=("lost_answer", "slowdown")) as proxy:
        for turn in range(5):
            uri = s3.uri(bucket, "claims", str(turn), port=proxy.port)

            def create(number, uri=uri):
                return storage.create(uri, b"%d" % number)

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(create, range(8)))
            assert sum(won) == 1, won
            assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert proxy.counts["lost_answer"] > 3, proxy.counts
    assert len(storage.list_files(s3.uri(bucket))) == 5


def test_everything_through_a_network_that_fails(s3, bucket):  # noqa: F811
    data = os.urandom(40 * 2**20)
    with faulty_proxy(s3.port, rate=0.2, seed=1, delay=0.1) as proxy:
        root = s3.uri(bucket, "data", port=proxy.port)
        storage.write_bytes(storage.join(root, "large"), data)
        names = [f"{number:03d}" for number in range(100)]

        def write(name):
            storage.write_bytes(storage.join(root, name), name.encode() * 1000)

        def read(name):
            with storage.open_input(storage.join(root, name)) as file:
                assert file.size() == 3000
                return file.read() + storage.read_bytes(storage.join(root, name))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write, names))
            found = list(pool.map(read, names))
        assert found == [name.encode() * 2000 for name in names]
        assert storage.read_bytes(storage.join(root, "large")) == data
        assert [file.path for file in storage.list_files(root)] == [*names, "large"]
        storage.delete_prefix(root)
        assert storage.list_files(root) == []
    assert set(proxy.counts) == {"ok", *FAULTS}


def test_columns_through_a_network_that_fails(s3, bucket):  # noqa: F811
    images = write_images(s3.uri(bucket, "images"))
    expected = images.read_rows(0, images.num_rows)
    positions = range(len(images.row_groups))
    with faulty_proxy(s3.port, rate=0.3, seed=2, delay=0.1) as proxy:
        table = ImageTable.open(s3.uri(bucket, "images", port=proxy.port))
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                groups = list(pool.map(table.read_row_group, positions))
                assert pa.concat_tables(groups).equals(expected)
    assert set(proxy.counts) == {"ok", *FAULTS}


def test_columns_are_read_with_the_settings_of_s3fs(s3, bucket, tmp_path, monkeypatch):  # noqa: F811
    images = write_images(s3.uri(bucket, "images"))
    (tmp_path / "credentials").write_text(
        f"[cluster]\naws_access_key_id={os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key={os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    uri = f"s3://{bucket}/images?profile=cluster"
    with storage.open_shared(storage.join(uri, images.parts[0].name)) as file:
        assert file.size() == images.parts[0].bytes
    assert ImageTable.open(uri).read_rows(0, 5).equals(images.read_rows(0, 5))


def read_in_child(uri, answers):
    gc.collect()
    answers.put(storage.read_bytes(uri))


def test_a_forked_process_reads_too(s3, bucket):  # noqa: F811
    uri = s3.uri(bucket, "x")
    storage.write_bytes(uri, b"1")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    begun = time.monotonic()
    for _ in range(4):
        child = context.Process(target=read_in_child, args=(uri, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert answers.get() == storage.read_bytes(uri) == b"1"
    # No connection of the parent was closed under it: it would wait for its time-out.
    assert time.monotonic() - begun < stores.S3_CONFIG["read_timeout"]


def test_bucket_and_credentials_are_named(s3, bucket, tmp_path, monkeypatch):  # noqa: F811
    missing = s3.uri("no-such-bucket", "x")
    for action in (storage.read_bytes, storage.exists, storage.list_files, open_source):
        with pytest.raises(StoreError, match=r"^s3://no-such-bucket: .* create it") as raised:
            action(missing)
    assert isinstance(raised.value, OSError)
    uri = s3.uri(bucket, "x")
    storage.write_bytes(uri, b"1")
    uri += "&profile=cluster"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StoreError, match=f"^s3://{bucket}: .* no profile"):
        storage.read_bytes(uri)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    wrong = [
        ("nobody", secret, "does not know this access key"),
        (os.environ["AWS_ACCESS_KEY_ID"], "guessed", "secret key is wrong"),
    ]
    # moto looks at no credentials.
    cases = [*(wrong if s3.kind == "ceph" else []), (os.environ["AWS_ACCESS_KEY_ID"], secret, None)]
    for key, right, message in cases:
        (tmp_path / "credentials").write_text(
            f"[cluster]\naws_access_key_id={key}\naws_secret_access_key={right}\n"
        )
        fsspec.filesystem("s3").clear_instance_cache()
        if message is None:
            assert storage.read_bytes(uri) == b"1"
            continue
        for action in (storage.read_bytes, storage.exists):
            with pytest.raises(StoreError, match=f"^s3://{bucket}: .*{message}"):
                action(uri)


def tables_below(uri):
    images = write_images(storage.join(uri, "images"))
    write_tokens(storage.join(uri, "tokens"), images)
    return images.uri, storage.join(uri, "tokens")


def test_pretraining(s3, bucket, tmp_path, monkeypatch):  # noqa: F811
    remote, local = s3.uri(bucket), str(tmp_path)
    run_uri = storage.join(remote, "run")
    config = small_config(tables_below(remote), run_uri)
    # Interrupted after its second checkpoint, then continued by the same command.
    with monkeypatch.context() as patch, pytest.raises(StageFailed, match="stopped here"):
        patch.setattr(pretrain, "train_loop", stopping_at(9))
        pretrain.run(config)
    result = pretrain.run(config)
    assert result.resumed_from == 8
    assert [attempt.start_step for attempt in RunDir(run_uri).attempts()] == [0, 8]
    expected = pretrain.run(small_config(tables_below(local), storage.join(local, "run")))
    assert weight_bytes(run_uri) == weight_bytes(expected.run_uri)
    assert per_step(run_uri) == per_step(expected.run_uri)
    assert pretrain.run(config).resumed_from == result.steps


def stopping_at(step):
    """`train_loop` that fails with that batch."""

    train_loop = pretrain.train_loop

    def loop(config, plan, world, log):
        real = pretrain.WorkerData.batches

        def batches(self, segments):
            for number, batch in enumerate(real(self, segments)):
                if number == step:
                    raise StageFailed("stopped here")
                yield batch

        pretrain.WorkerData.batches = batches
        try:
            train_loop(config, plan, world, log)
        finally:
            pretrain.WorkerData.batches = real

    return loop


def test_tokenizer_training(s3, bucket, tmp_path):  # noqa: F811
    pictures = [disc(seed) for seed in range(40)]
    outputs = []
    for root in (s3.uri(bucket), str(tmp_path)):
        images = image_table(storage.join(root, "images"), pictures)
        config = replaced(
            replaced(settings(images, storage.join(root, "out")), "loss", temperature_steps=6),
            "optim",
            steps=6,
        )
        config = replaced(config, "data", codebook_images=40)
        outputs.append(train_tokenizer.run(config))
    assert outputs[0].fingerprint == outputs[1].fingerprint
    loaded = tokenizer_store.load(outputs[0].output)
    assert loaded.fingerprint() == outputs[0].fingerprint


def test_a_joined_table_and_tokens_that_are_reused(s3, bucket, tmp_path):  # noqa: F811
    """All on the store: training sees the rows and tokens of one table on a disk."""
    remote, local = s3.uri(bucket), str(tmp_path)
    tables = tables_below(local)
    whole = ImageTable.open(tables[0])
    uris = halves(whole, remote)
    both = ImageTable.open(joined(*uris, output=storage.join(remote, "both")).uri)
    assert [file.path for file in storage.list_files(both.uri)] == ["manifest.json"]
    # The tokens of one half are there, those of the other are made.
    half, tokens = ImageTable.open(uris[1]), storage.join(remote, "half-tokens")
    write_tokens(tokens, half)
    write_tokens(storage.join(remote, "tokens"), both)
    made = TokenTable.open(storage.join(remote, "tokens"))
    config = TokenizeConfig(
        images=both.uri, tokenizer="t", output="o", reuse=[tokens], reuse_images=[half.uri]
    )
    older = older_tables(config, both, made.identity.to_dict(), {})
    origins = Origins(both, older)
    assert origins.num_reused == half.num_rows
    unit = Unit(
        index=0, part=both.parts[1].to_dict(), start=0, stop=half.num_rows,
        reused=origins.runs(half.num_rows, both.num_rows),
    )  # fmt: skip
    copied = render_unit(both.uri, unit, made.identity, older)
    assert len(copied.pixels) == 0
    np.testing.assert_array_equal(copied.token_ids, made.read_rows(half.num_rows, both.num_rows)[1])
    optim = {"steps": 6, "warmup_steps": 1}
    runs = [
        pretrain.run(small_config(given, storage.join(place, "run"), optim=optim)).run_uri
        for place, given in ((local, tables), (remote, (both.uri, made.uri)))
    ]
    assert weight_bytes(runs[0]) == weight_bytes(runs[1])
    assert per_step(runs[0]) == per_step(runs[1])


def test_audit(s3, bucket):  # noqa: F811
    root = s3.uri(bucket)
    images = ImageTable.open(world.make_images(storage.join(root, "images"), count=60))
    tokenizer = world.make_tokenizer(storage.join(root, "tokenizer"))
    tokens = storage.join(root, "tokens")
    world.write_tokens(images, tokenizer, tokens)
    config = AuditConfig(table=tokens, images=images.uri, tokenizer=tokenizer, samples=20)
    assert audit.run(config).samples == 20
    assert audit.run(AuditConfig(table=images.uri)).num_files == 3
    name = next(f.path for f in storage.list_files(tokens) if f.path.endswith(".parquet"))
    damaged = bytearray(storage.read_bytes(storage.join(tokens, name)))
    damaged[len(damaged) // 2] ^= 1
    storage.write_bytes(storage.join(tokens, name), bytes(damaged))
    with pytest.raises(StageFailed, match=name):
        audit.run(config)
