"""Runs and their lineage, against a real MLflow store."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from beit.mim import BeitMIM
from beit.weights import save_weights
from pipelines import tracking
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.tracking.filler import known_pictures
from pipelines.tracking.lineage import lineage, users
from tests.pipelines.tracking_fixtures import (  # noqa: F401 - fixtures
    REPOSITORY,
    config_fixture,
    dataset,
    free_port,
    start,
    steps,
)

# Driver


def test_a_run_holds_everything_that_was_said(config, tmp_path):
    images = tracking.Dataset(
        name="image_table", uri="/data/emoji", digest="a" * 32, context="training", rows=4009,
        columns={"key": "string"},
    )  # fmt: skip
    inputs = [images, dataset("tokenizer", "t" * 32)]
    config = dataclasses.replace(config, job_id="job-7")
    with start(config, params={"optim.lr": 1e-3}, inputs=inputs, note="**hello**") as run:
        for step in range(5):
            run.log_metrics({"loss": 1 / (1 + step), "odd name?": step}, step)
        run.log_image("pictures/masked", Image.new("RGB", (32, 32)), 4)
        run.log_artifact_file("deep/er/data.bin", b"\x00\x01")
        run.log_table("table.json", {"class": ["cat", "dog"], "share": [0.5, 0.25]})
        run.set_output(dataset("token_table", "k" * 32, uri="/data/tokens"))
        assert "make ui" in run.where
        assert str(tmp_path / "mlflow.db") in run.where

    client = MlflowClient(config.uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"optim.lr": "0.001"}
    assert steps(client, run, "loss") == [0, 1, 2, 3, 4]
    assert stored.data.metrics["odd name_"] == 4
    tags = stored.data.tags
    assert tags["mlflow.note.content"] == "**hello**"
    assert tags["beit.stage"] == "tokenize"
    assert tags["mlflow.source.name"] == "beit tokenize"
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert tags["beit.code.dirty"] in ("true", "false")
    assert tags["beit.torch"] == torch.__version__
    assert tags["beit.job_id"] == "job-7"
    assert {"beit.host", "beit.ray", "beit.version", "mlflow.user", "beit.heartbeat"} <= set(tags)
    assert tags["beit.input.tokenizer"] == "t" * 32
    assert tags["beit.output.token_table"] == "k" * 32
    assert tags["beit.output.token_table.uri"] == "/data/tokens"
    [table] = stored.inputs.dataset_inputs
    assert (table.dataset.name, table.dataset.digest) == ("emoji (image table)", "a" * 32)
    assert json.loads(table.dataset.profile) == {"num_rows": 4009}
    assert json.loads(table.dataset.schema)["mlflow_colspec"][0]["name"] == "key"
    assert {tag.key: tag.value for tag in table.tags} == {"mlflow.data.context": "training"}
    assert known_pictures(client, run.run_id) == {("pictures/masked", 4)}
    files = tmp_path / "mlartifacts" / "beit" / run.run_id / "artifacts"
    assert (files / "deep/er/data.bin").read_bytes() == b"\x00\x01"
    assert (files / "config.yaml").read_text() == "optim.lr: 0.001\n"
    assert (files / "table.json").exists()


def test_files_lie_beside_the_store_wherever_a_process_runs(config, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with start(config) as run:
        run.log_artifact_file("x.txt", b"x")
    assert list(elsewhere.iterdir()) == []
    assert (tmp_path / "mlartifacts/beit" / run.run_id / "artifacts/x.txt").exists()


def test_the_default_store_is_in_the_working_directory(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    with start(TrackingConfig()) as run:
        pass
    assert f"sqlite:///{tmp_path}/mlflow.db" in run.where
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run.run_id)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_status_tells_how_a_stage_ended(config, error, status):
    with pytest.raises(type(error)), start(config) as run:
        raise error
    stored = MlflowClient(config.uri).get_run(run.run_id)
    assert stored.info.status == status
    assert stored.data.tags["beit.error"].startswith(type(error).__name__)


def test_a_resumed_run_goes_on_without_repeating_steps(config):
    with start(config, params={"lr": 1, "steps": 10}) as run:
        for step in range(10):
            run.log_metrics({"loss": 0.0}, step)
        run.log_metrics({"probe": 0.5}, 4)
        run.log_image("tokens", Image.new("RGB", (8, 8)), 5)

    again = start(config, params={"lr": 2, "more": 3}, resume_run_id=run.run_id)
    client = MlflowClient(config.uri)
    assert again.run_id == run.run_id
    assert client.get_run(run.run_id).info.status == "RUNNING"
    for step in range(6, 15):
        again.log_metrics({"loss": 1.0}, step)
    again.log_metrics({"probe": 0.6}, 8)
    again.log_image("tokens", Image.new("RGB", (8, 8)), 5)
    again.log_image("tokens", Image.new("RGB", (8, 8)), 10)
    again.finish()

    assert steps(client, run, "loss") == list(range(15))
    assert steps(client, run, "probe") == [4, 8]
    assert known_pictures(client, run.run_id) == {("tokens", 5), ("tokens", 10)}
    assert len(client.list_artifacts(run.run_id, "images")) == 4  # two files a picture
    data = client.get_run(run.run_id).data
    assert data.params == {"lr": "1", "steps": "10", "more": "3"}
    assert data.tags["beit.resumed.lr"] == "2"


def test_a_run_that_the_store_lost_is_replaced(config):
    with start(config, resume_run_id="0" * 32) as run:
        assert run.run_id
        assert run.run_id != "0" * 32


def test_switched_off_tracking_does_nothing_and_imports_nothing(tmp_path):
    program = """
        import sys
        from PIL import Image
        from pipelines import tracking
        from pipelines.config.tracking import TrackingConfig
        with tracking.start_run(TrackingConfig(enabled=False), stage="x", params={}) as run:
            run.log_metrics({"loss": 1.0}, 1)
            run.log_image("a", Image.new("RGB", (4, 4)), 1)
            run.log_artifact_file("x.txt", b"x")
            run.log_weights("/nowhere")
        assert "mlflow" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, check=True
    )
    assert list(tmp_path.iterdir()) == []


def test_unusable_uris_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"tracking\.uri: '/some/dir'.*sqlite:////some/dir"):
        start(TrackingConfig(uri="/some/dir"))
    with pytest.raises(InputError, match=r"tracking\.artifact_uri"):
        tracking.tracking_store.artifact_location(TrackingConfig(), "postgresql://host/db")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"tracking\.uri: .*cannot be used"):
        start(TrackingConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db"))


def test_a_server_that_is_away_is_told_within_seconds():
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"tracking\.uri: no answer from http://127\.0\.0\.1"):
        start(TrackingConfig(uri=f"http://127.0.0.1:{free_port()}"))
    assert time.monotonic() - begin < 10


def test_a_deleted_experiment_is_refused(config):
    with start(config):
        pass
    client = MlflowClient(config.uri)
    client.delete_experiment(client.get_experiment_by_name("beit").experiment_id)
    with pytest.raises(InputError, match=r"tracking\.experiment: 'beit' is deleted"):
        start(config)


def test_a_stage_outlives_a_store_that_fails_under_it(config, tmp_path, caplog):
    with start(config, output=str(tmp_path / "out")) as run:
        run._background.filler.patience = 1.0
        (tmp_path / "mlflow.db").write_bytes(b"no database")
        run.set_tags({"a": "b"})
        run.log_artifact_file("x.txt", b"x")
    assert "takes nothing" in caplog.text
    assert (tmp_path / "out.record/files/x.txt").read_bytes() == b"x"


# Lineage


@pytest.fixture(scope="module", name="chain")
def chain_fixture(empty_store, tmp_path_factory):
    """Store and runs of a chain, by name; made once."""
    path = tmp_path_factory.mktemp("chain") / "mlflow.db"
    shutil.copy(empty_store, path)
    config, runs = TrackingConfig(uri=f"sqlite:///{path}"), {}
    for name, stage, inputs, outputs in (
        ("prepare", "prepare", [], [("image_table", "I")]),
        ("tokenizer", "train-tokenizer", [("image_table", "I")], [("tokenizer", "T")]),
        ("tokens", "tokenize", [("image_table", "I"), ("tokenizer", "T")], [("token_table", "K")]),
        ("more", "tokenize", [("image_table", "I"), ("tokenizer", "T")], [("token_table", "L")]),
        (
            "pretrain",
            "pretrain",
            [("image_table", "I"), ("token_table", "K"), ("token_table", "L")],
            [("weights", "W")],
        ),
        ("evaluate", "evaluate", [("weights", "W"), ("image_table", "J")], []),
    ):
        given = [dataset(kind, digest * 32) for kind, digest in inputs]
        with start(config, stage=stage, inputs=given) as run:
            for kind, digest in outputs:
                run.set_output(dataset(kind, digest * 32))
        runs[name] = run.run_id
    return config, runs


def test_lineage_walks_from_an_evaluation_to_the_images(chain):
    config, runs = chain
    node = lineage(runs["evaluate"], tracking_uri=config.uri)
    assert node.inputs == {"image_table": ["J" * 32], "weights": ["W" * 32]}
    [pretrain] = node.parents
    assert pretrain.stage == "pretrain"
    assert pretrain.inputs["token_table"] == ["K" * 32, "L" * 32]
    walked = {found.run_id for found in node.walk()}
    assert walked == set(runs.values())


def test_users_of_an_artefact_are_found(chain):
    config, runs = chain
    found = users("token_table", "L" * 32, tracking_uri=config.uri)
    assert [node.run_id for node in found] == [runs["pretrain"]]
    assert {node.stage for node in users("weights", "W" * 32, tracking_uri=config.uri)} == {
        "evaluate"
    }


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def registered(config, tmp_path):
    """A tiny network, registered twice (which is once), and its run."""
    model = BeitMIM(
        image_size=16, patch_size=8, dim=16, depth=2, num_heads=2, vocab_size=8,
        absolute_positions=True, relative_positions="none", layer_scale_init=None,
    )  # fmt: skip
    save_weights(model, tmp_path / "weights", extra={"pixel_mean": MEAN, "pixel_std": STD})
    run_id = None
    for _ in range(2):
        with start(config, stage="pretrain", resume_run_id=run_id) as run:
            run.log_weights(str(tmp_path / "weights"), registered_model_name="beit-small")
        run_id = run.run_id
    return model.eval(), run_id


def features(model, images, layer=None):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return model.features(pixels, layer=layer)[:, 1:].mean(1).numpy()


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_weights_become_a_model_without_pickle(config, tmp_path):
    import mlflow

    model, run_id = registered(config, tmp_path)
    mlflow.set_tracking_uri(config.uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/beit-small/1")
    finally:
        mlflow.set_tracking_uri(None)
    np.testing.assert_allclose(loaded.predict(IMAGES), features(model, IMAGES), atol=1e-5)
    first = loaded.predict(IMAGES, params={"layer": 1})
    np.testing.assert_allclose(first, features(model, IMAGES, 1), atol=1e-5)
    stored = [path.suffix for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert ".safetensors" in stored
    assert not {".pkl", ".pickle", ".pt", ".pth", ".bin"} & set(stored)
    client = MlflowClient(config.uri)
    assert len(client.get_run(run_id).outputs.model_outputs) == 1
    assert len(client.search_model_versions("name = 'beit-small'")) == 1


@pytest.mark.long
def test_the_code_travels_with_the_model(config, tmp_path):
    """Loaded where this repository is not on the path."""
    model, _ = registered(config, tmp_path)
    np.save(tmp_path / "images.npy", IMAGES)
    program = f"""
        import mlflow, numpy as np
        mlflow.set_tracking_uri({config.uri!r})
        model = mlflow.pyfunc.load_model("models:/beit-small/1")
        np.save("last.npy", model.predict(np.load("images.npy")))
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, check=True
    )
    np.testing.assert_allclose(np.load(tmp_path / "last.npy"), features(model, IMAGES), atol=1e-5)
