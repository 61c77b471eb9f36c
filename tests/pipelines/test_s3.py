"""The whole chain of artefacts on an S3 server: the same bytes as on local disk."""

import pytest

from pipelines import audit, pretrain, storage, train_tokenizer
from pipelines.config.audit import AuditConfig
from pipelines.errors import StageFailed
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.training.run_dir import RunDir
from tests.chaos import world
from tests.pipelines.pretrain_fixtures import (
    per_step,
    small_config,
    weight_bytes,
    write_images,
    write_tokens,
)
from tests.pipelines.test_audit import write_tokens as write_real_tokens
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table
from tests.s3_server import bucket, s3  # noqa: F401 - fixtures


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


def test_audit(s3, bucket):  # noqa: F811
    root = s3.uri(bucket)
    images = ImageTable.open(world.make_images(storage.join(root, "images"), count=60))
    tokenizer = world.make_tokenizer(storage.join(root, "tokenizer"))
    tokens = storage.join(root, "tokens")
    write_real_tokens(images, tokenizer, tokens)
    config = AuditConfig(table=tokens, images=images.uri, tokenizer=tokenizer, samples=20)
    assert audit.run(config).samples == 20
    assert audit.run(AuditConfig(table=images.uri)).num_files == 3
    name = next(f.path for f in storage.list_files(tokens) if f.path.endswith(".parquet"))
    damaged = bytearray(storage.read_bytes(storage.join(tokens, name)))
    damaged[len(damaged) // 2] ^= 1
    storage.write_bytes(storage.join(tokens, name), bytes(damaged))
    with pytest.raises(StageFailed, match=name):
        audit.run(config)
