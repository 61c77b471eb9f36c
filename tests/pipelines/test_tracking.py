"""Runs and their lineage, against a real MLflow store."""

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from beit.mim import BeitMIM
from beit.views import center_view, render
from beit.weights import save_weights
from jobs.cli import config_class
from pipelines import lineage as lineage_stage
from pipelines import storage, tracking
from pipelines.config.checks import flatten, to_dict
from pipelines.config.lineage import LineageConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tracking import model_registry
from pipelines.tracking.filler import FIGURE_WIDTH, known_pictures
from pipelines.tracking.lineage import lineage, users
from pipelines.tracking.spool import Spool
from pipelines.tracking.store import address
from pipelines.tracking.table import (
    DECIDING,
    VIEWS,
    deciding,
    renamed,
    run_name,
    where_to_look,
)
from tests.pipelines.tracking_fixtures import (  # noqa: F401 - fixtures
    REPOSITORY,
    config_fixture,
    dataset,
    start,
    steps,
)
from tests.servers import free_port

WIDE = Image.new("RGB", (1520, 76))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def tiny_model():
    return BeitMIM(
        image_size=16, patch_size=8, dim=16, depth=2, num_heads=2, vocab_size=8,
        absolute_positions=True, relative_positions="none", layer_scale_init=None,
    )  # fmt: skip


# Driver


def test_a_run_holds_everything_that_was_said(config, tmp_path):
    images = tracking.Dataset(
        name="image_table", uri="/data/emoji", digest="a" * 32, context="training", rows=4009,
    )  # fmt: skip
    inputs = [images, dataset("tokenizer", "t" * 32)]
    config = dataclasses.replace(config, job_id="job-7")
    with start(config, params={"num_views": 4}, inputs=inputs, note="**hello**") as run:
        for step in range(5):
            run.log_metrics({"loss": 1 / (1 + step), "odd name?": step}, step)
        run.log_image("pictures/masked", Image.new("RGB", (32, 32)), 4)
        run.log_artifact_file("deep/er/data.bin", b"\x00\x01")
        run.log_table("table.json", {"class": ["cat", "dog"], "share": [0.5, 0.25]})
        run.set_output(dataset("token_table", "k" * 32, uri="/data/tokens"))
        assert f"beit ui --uri sqlite:///{tmp_path}/mlflow.db" in run.where

    client = MlflowClient(config.uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"num_views": "4"}
    assert steps(client, run, "loss") == [0, 1, 2, 3, 4]
    assert stored.data.metrics["odd name_"] == 4
    tags = stored.data.tags
    assert tags["mlflow.note.content"].startswith("**hello**\n\n![pictures_masked.png](get-art")
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
    assert (files / "config.yaml").read_text() == "num_views: 4\n"
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
    assert stored.data.tags[NOTE] == f"**It did not end well:** {type(error).__name__}: {error}"


def test_a_resumed_run_goes_on_without_repeating_steps(config):
    with start(config, stage="audit", params={"lr": 1, "steps": 10}) as run:
        for step in range(10):
            run.log_metrics({"loss": 0.0}, step)
        run.log_metrics({"probe": 0.5}, 4)
        run.log_image("tokens", Image.new("RGB", (8, 8)), 5)

    again = start(config, stage="audit", params={"lr": 2, "more": 3}, resume_run_id=run.run_id)
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


def test_a_run_names_its_own_weights_wherever_it_lies(tmp_path):
    run = tracking.SpooledRun(Spool(str(tmp_path)), None)
    run.log_weights(str(tmp_path / "weights"))
    assert Spool(str(tmp_path)).record()["weights"]["uri"] == "weights"


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


# The table, and what it answers


def linked(client, run_id):
    return set(re.findall(r"/runs/([0-9a-f]{32})", client.get_run(run_id).data.tags[NOTE]))


NOTE = "mlflow.note.content"


@pytest.fixture(scope="module", name="judged")
def judged_fixture(empty_store, tmp_path_factory):
    """Two pretrainings on tokens of tokenizers S and T, each evaluated, by name; made once."""
    path = tmp_path_factory.mktemp("judged") / "mlflow.db"
    shutil.copy(empty_store, path)
    config, runs = TrackingConfig(uri=f"sqlite:///{path}"), {}
    images = dataset("image_table", "I" * 32, uri="/data/emoji/images")
    with start(config, stage="prepare", params={"source": "/raw/emoji"}) as made:
        made.set_output(images)
    runs["prepare"] = made.run_id
    save_weights(
        tiny_model(), path.parent / "weights", extra={"pixel_mean": MEAN, "pixel_std": STD}
    )
    for seed, tokenizer in enumerate("ST"):
        inputs = [images, dataset("tokenizer", tokenizer * 32)]
        params = {"model.dim": 192, "model.depth": 12, "objective.kind": "beit", "seed": seed,
                  "masking.kind": "blockwise", "masking.num_masked": 75, "optim.steps": 100,
                  "images": images.uri, "log_every": 10}  # fmt: skip
        with start(config, stage="pretrain", params=params, inputs=inputs) as run:
            run.set_note("Finished.")
            run.log_image("painted", WIDE, 3)
            run.set_output(dataset("weights", str(seed) * 32))
            run.log_weights(str(path.parent / "weights"))
        runs[tokenizer] = run.run_id
        weights = dataset("weights", str(seed) * 32)
        with start(config, stage="evaluate", inputs=[weights, images], parent_run_id=run.run_id,
                   tags={"beit.tokenizer": tokenizer * 32}) as judge:  # fmt: skip
            gains = {"gain_over/pixels": 0.02, "gain_low/pixels": -0.01}
            judge.log_metrics(gains | {"gain_high/pixels": 0.05})
            accuracy = 0.5 + 0.1 * seed
            found = {"linear_accuracy": accuracy, "linear_low": accuracy - 0.02}
            judge.judge(found | {"linear_high": accuracy + 0.02}, images)
        runs[f"evaluate {tokenizer}"] = judge.run_id
    return config, runs, MlflowClient(config.uri)


def test_the_best_probe_of_every_tokenizer_is_one_query(judged):
    _, runs, client = judged
    found = client.search_runs(
        ["1"], "tags.`beit.stage` = 'pretrain'", order_by=["metrics.linear_accuracy DESC"]
    )
    best = {run.data.tags["beit.tokenizer"]: run.data.metrics for run in reversed(found)}
    assert [run.info.run_id for run in found] == [runs["T"], runs["S"]]
    assert best["S" * 32]["linear_accuracy"] == 0.5
    assert best["T" * 32]["linear_high"] == pytest.approx(0.62)


def test_all_runs_on_an_image_table_are_one_query(judged):
    _, runs, client = judged
    found = client.search_runs(["1"], f"tags.`beit.input.image_table` LIKE '%{'I' * 32}%'")
    assert {run.info.run_id for run in found} == set(runs.values()) - {runs["prepare"]}


def test_what_made_a_model_is_one_query(judged):
    _, runs, client = judged
    found = client.search_logged_models(["1"], "metrics.linear_accuracy > 0.55")
    assert [model.source_run_id for model in found] == [runs["T"]]
    assert found[0].tags["beit.input.tokenizer"] == "T" * 32
    assert found[0].tags["beit.input.image_table"] == "I" * 32
    [metric] = [m for m in found[0].metrics if m.key == "linear_accuracy"]
    assert (metric.dataset_name, metric.dataset_digest) == ("emoji (image table)", "I" * 32)


def test_an_evaluation_lies_under_its_run_and_the_page_begins_with_its_verdict(judged):
    _, runs, client = judged
    assert client.get_run(runs["evaluate S"]).data.tags["mlflow.parentRunId"] == runs["S"]
    note = client.get_run(runs["S"]).data.tags[NOTE]
    assert note.splitlines()[0] == (
        "**Linear probe 50.0 % [48.0, 52.0], +2.0 points [-1.0, +5.0] over raw pixels: "
        "no clear difference.**"
    )
    assert linked(client, runs["S"]) == {runs["prepare"], runs["evaluate S"]}
    picture = f"![painted.png](get-artifact?path=figures/painted.png&run_uuid={runs['S']})"
    assert picture in note
    assert linked(client, runs["evaluate S"]) == {runs["prepare"], runs["S"]}


def test_figures_of_the_page_are_no_wider_than_it_and_pictures_keep_their_size(judged):
    _, runs, client = judged

    def size(name):
        with Image.open(client.download_artifacts(runs["S"], name)) as image:
            return image.size

    [picture] = [
        f.path for f in client.list_artifacts(runs["S"], "images") if "compr" not in f.path
    ]
    assert size(picture) == WIDE.size
    assert size("figures/painted.png") == (FIGURE_WIDTH, FIGURE_WIDTH // 20)


def test_names_and_parameters_say_what_differs(judged):
    _, runs, client = judged
    run = client.get_run(runs["T"])
    assert run.info.run_name == "beit · tiny · blockwise 75 · 100 steps · emoji · seed 1"
    assert "log_every" not in run.data.params
    assert len(run.data.params) <= 15
    kept = client.download_artifacts(runs["T"], "config.yaml")
    assert "log_every: 10" in Path(kept).read_text()


@pytest.mark.parametrize(
    ("stage", "params", "name"),
    [
        ("tokenize", {"images": "/a/emoji/images", "tokenizer": "/a/emoji/tokenizer",
                      "num_views": 4}, "tokenize · 4 views · emoji"),
        ("render", {"images": "/a/emoji/images", "num_views": 4, "form": "jpeg95"},
         "render · 4 jpeg95 views · emoji"),
        ("pretrain", {"objective.kind": "mae", "masking.kind": "random", "masking.num_masked": 147,
                      "optim.steps": 9, "images": "/a/emoji/images", "output": "/a/low-lr/run"},
         "mae · low-lr · random 147 · 9 steps · emoji"),
        ("pretrain", {"objective.kind": "beit", "masking.kind": "blockwise", "optim.steps": None,
                      "masking.num_masked": 75, "optim.epochs": 800.0, "images": "/a/emoji"},
         "beit · blockwise 75 · 800 epochs · emoji"),
        ("evaluate", {"run": "s3://a/base/run?region=x", "images": "/a/emoji/images"},
         "evaluate · base · emoji"),
        ("train-tokenizer", {"model.architecture": "dvae", "model.kind": "vqkd", "model.depth": 12,
                             "model.dim": 768, "model.vocab_size": 8192, "images": "/a/emoji",
                             "seed": 1}, "train-tokenizer · vqkd 8192 · emoji · seed 1"),
    ],
)  # fmt: skip
def test_names_say_each_thing_once(stage, params, name):
    assert run_name(stage, params) == name


def test_the_saved_views_are_those_of_the_page(judged):
    _, _, client = judged
    tags = client.get_experiment("1").tags
    for key, view in VIEWS.items():
        saved = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        form, _, packed = saved["state"].partition(";")
        state = json.loads(zlib.decompress(base64.b64decode(packed)))
        assert (form, saved["name"]) == ("deflate", view["name"])
        assert client.search_runs(["1"], state["searchFilter"])
        assert "metrics.`linear_accuracy`" in state["selectedColumns"]


def test_headings_differ_before_the_table_cuts_them():
    """MLflow shows 13 characters of them at the widths it begins with."""
    for view in VIEWS.values():
        headings = [column.split("`")[1][:13] for column in view["columns"]]
        assert len(set(headings)) == len(headings)


def test_metrics_of_earlier_evaluations_are_known_by_their_new_names():
    before = {"linear_accuracy": 5, "linear_accuracy_low": 4, "linear_accuracy_high": 6}
    before |= {"gain_over/pixels": 2, "gain_over/pixels_low": 1, "gain_over/pixels_high": 3}
    now = {"linear_accuracy": 5, "linear_low": 4, "linear_high": 6}
    now |= {"gain_over/pixels": 2, "gain_low/pixels": 1, "gain_high/pixels": 3}
    assert renamed(before) == renamed(now) == now
    stale = dict.fromkeys(before, 9)
    assert renamed(now | {name: 9 for name in stale if name not in now}) == now
    assert renamed(stale | now) == now


def test_deciding_parameters_are_fields_of_their_stages():
    for stage, names in DECIDING.items():
        config = config_class(stage)
        required = {
            field.name: "x" for field in dataclasses.fields(config)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }  # fmt: skip
        known = set(flatten(to_dict(config(**required))))
        if stage == "tokenize":  # which records the identity of its tokens, too
            known |= {"precision", "image_size"}
        assert set(names) <= known, stage
        assert len(deciding(stage, dict.fromkeys(names, 1))) <= 15  # what a reader sees
    for steps_given, used in ((None, "optim.epochs"), (9, "optim.steps")):
        params = {"optim.steps": steps_given, "optim.epochs": 800}
        assert list(deciding("pretrain", params)) == [used]


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
        ("tuned", "finetune", [("image_table", "I"), ("test_table", "I")], []),
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
    assert walked == set(runs.values()) - {runs["tuned"]}


def test_users_of_an_artefact_are_found(chain):
    config, runs = chain
    found = users("token_table", "L" * 32, tracking_uri=config.uri)
    assert [node.run_id for node in found] == [runs["pretrain"]]
    assert {node.stage for node in users("weights", "W" * 32, tracking_uri=config.uri)} == {
        "evaluate"
    }


def test_the_command_shows_both_directions(chain, tmp_path):
    config, runs = chain
    shown = lineage_stage.run(LineageConfig(artefact=runs["pretrain"], tracking=config)).summary()
    before, after = shown.split("used by")
    for name in ("pretrain", "prepare", "tokenizer", "tokens", "more"):
        assert runs[name][:8] in before
    assert before.count("KKKKKKKKKKKK") == 2, "read by pretrain, made by tokenize"
    assert runs["evaluate"][:8] in after
    # A table that was moved is known by what its manifest says.
    storage.write_json(
        str(tmp_path / "manifest.json"), {"kind": "token_table", "fingerprint": "K" * 32}
    )
    moved = lineage_stage.run(LineageConfig(artefact=str(tmp_path), tracking=config)).lines
    assert runs["tokens"][:8] in moved[1]
    assert any(runs["pretrain"][:8] in line for line in moved)


def test_a_gap_in_the_chain_fails_and_is_named(chain, capsys):
    config, runs = chain
    with pytest.raises(
        StageFailed, match=f"image_table {'J' * 32}, read by .*{runs['evaluate'][:8]}"
    ):
        lineage_stage.run(LineageConfig(artefact=runs["evaluate"], tracking=config))
    assert runs["prepare"][:8] in capsys.readouterr().out, "what is known is shown all the same"
    # What an earlier version called the table that a fine-tuning is tested on is none.
    assert not lineage(runs["tuned"], tracking_uri=config.uri).gaps


def test_what_the_store_does_not_know_is_refused(chain, tmp_path):
    config, _ = chain
    for artefact, message in (
        ("models:/nothing/1", "artefact = 'models:/nothing/1'"),
        ("0" * 32, "artefact = '0000"),
        (str(tmp_path), "no run, model, weights, tokenizer or table is there"),
    ):
        with pytest.raises(InputError, match=message):
            lineage_stage.run(LineageConfig(artefact=artefact, tracking=config))
    save_weights(tiny_model(), tmp_path / "weights", extra={})
    with pytest.raises(InputError, match="no run of this store made or read the weights"):
        lineage_stage.run(LineageConfig(artefact=str(tmp_path / "weights"), tracking=config))


def test_lineage_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no run is recorded at '{tmp_path}/mlflow.db'"):
        lineage_stage.run(LineageConfig(artefact="0" * 32))
    assert not list(tmp_path.iterdir())


def registered(config, tmp_path):
    """A tiny network, registered twice (which is once), and its run."""
    torch.manual_seed(0)
    model = tiny_model()
    model.init_weights(torch.Generator().manual_seed(0))
    save_weights(model, tmp_path / "weights", extra={"pixel_mean": MEAN, "pixel_std": STD})
    run_id = None
    for _ in range(2):
        images = dataset("image_table", "I" * 32, uri="/data/emoji")
        tested = dataclasses.replace(images, digest="J" * 32, context="evaluation", rows=7)
        tokenizer = dataset("tokenizer", "T" * 32)
        with start(
            config, stage="pretrain", params={"optim.lr": 0.001}, resume_run_id=run_id,
            inputs=[dataclasses.replace(images, rows=4009), tested, tokenizer],
        ) as run:  # fmt: skip
            run.log_image("painted", Image.new("RGB", (8, 8)), 3)
            run.set_output(dataset("weights", "W" * 32))
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
    import transformers

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
    [version] = client.search_model_versions("name = 'beit-small'")
    for said in ("- training: emoji (image table), 4,009 rows",
                 "- evaluation: emoji (image table), 7 rows", "T" * 32,
                 "| optim.lr &nbsp; | 0.001 |", "Not evaluated", "### Limits",
                 "![painted.png]"):  # fmt: skip
        assert said in version.description

    # An evaluation makes the card say what it found, and what an earlier version said is gone.
    client.set_model_version_tag("beit-small", "1", "linear_accuracy_low", "0.1000")
    with start(config, stage="evaluate", parent_run_id=run_id) as judge:
        judge.judge({"linear_accuracy": 0.5, "linear_low": 0.4,
                     "linear_high": 0.6}, dataset("image_table", "J" * 32))  # fmt: skip
    [version] = client.search_model_versions("name = 'beit-small'")
    assert "Linear probe 50.0 % [40.0, 60.0]" in version.description
    assert version.tags["linear_low"] == "0.4000"
    assert "linear_accuracy_low" not in version.tags
    assert version.tags["beit.tokenizer"] == "T" * 32

    # Images of any size are seen as evaluations see them.
    large = np.random.default_rng(1).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8)
    fitted = [
        render(Image.fromarray(one), center_view(40, 24, 1.0), 16, "bicubic") for one in large
    ]
    np.testing.assert_allclose(loaded.predict(large), features(model, np.stack(fitted)), atol=1e-5)

    # The same artifact is a folder for another library, which knows nothing of this one.
    [folder] = (tmp_path / "mlartifacts").rglob("huggingface")
    theirs = transformers.BeitModel.from_pretrained(folder).eval()
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        found = theirs(pixels).last_hidden_state[:, 1:].mean(1).numpy()
        # theirs ends before the final norm of a masked-image model
        own = model.features(pixels, layer=2)[:, 1:].mean(1).numpy()
    np.testing.assert_allclose(found, own, atol=1e-4)


def test_tries_to_store_weights_that_fail_leave_one_model(config, tmp_path, monkeypatch):
    client = MlflowClient(config.uri)
    save_weights(tiny_model(), tmp_path / "weights", extra={"pixel_mean": MEAN, "pixel_std": STD})
    with start(config, stage="pretrain") as run:
        pass

    def refuse(*_):
        raise ConnectionError("413")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", refuse)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            model_registry.log_weights(client, run.run_id, str(tmp_path / "weights"))
    monkeypatch.undo()
    model_id = model_registry.log_weights(client, run.run_id, str(tmp_path / "weights"))
    found = client.search_logged_models(["1"])
    assert [(one.model_id, one.status.value) for one in found] == [(model_id, "READY")]


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


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"enabled": False}, ""),
        ({}, "beit ui, or make ui in a checkout"),
        ({"uri": "sqlite:////a b/m.db"}, "beit ui --uri 'sqlite:////a b/m.db'"),
        (
            {"uri": "sqlite:////m.db", "experiment": "x"},
            "beit ui --uri sqlite:////m.db --experiment x",
        ),
    ],
)
def test_a_chain_ends_with_what_shows_its_runs(options, where):
    assert where_to_look(TrackingConfig(**options)) == where


def test_links_hold_no_password():
    server = f"http://anna:planted@127.0.0.1:{free_port()}"
    assert where_to_look(TrackingConfig(uri=server)) == address(server)
    assert address(server) == server.replace("anna:planted@", "")
