"""The whole chain, small, through the command and the recipe of `make run`."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cli, pipeline
from jobs.command import parse
from jobs.headline import DEMO_STEPS
from pipelines.errors import InputError, StageFailed
from pipelines.preparation.sample_images import list_images, read_image
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tracking.store import absolute_tracking_uri
from pipelines.training.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "jobs" / "configs"

SMALLER = [
    "--train_tokenizer.model.vocab_size=64",
    "--train_tokenizer.model.dim=32",
    "--train_tokenizer.loss.temperature_steps=16",
    "--train_tokenizer.optim.steps=20",
    "--train_tokenizer.optim.warmup_steps=2",
    "--train_tokenizer.data.codebook_images=256",
    "--train_tokenizer.gate.num_images=128",
    "--tokenize.num_views=2",
    "--pretrain.log_every=10",
    "--pretrain.model.dim=64",
    "--pretrain.model.depth=2",
    "--pretrain.model.num_heads=2",
    "--pretrain.data.global_batch_size=64",
    "--pretrain.optim.steps=120",
    "--pretrain.optim.warmup_steps=12",
    "--pretrain.checkpoint.every_steps=60",
    "--evaluate.num_folds=2",
]
MAE = {
    "objective": {"kind": "mae", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "model": {"relative_positions": "none"},
    "masking": {"kind": "random", "num_masked": 48},
    "optim": {"steps": 6, "warmup_steps": 1},
    "scaling": {"num_workers": 0},
}


@pytest.mark.parametrize("name", ["quickstart", "demo"])
def test_the_recipes_of_the_chain_parse(name: str) -> None:
    config = parse(
        pipeline.PipelineConfig,
        ["--config", str(CONFIGS / f"{name}.yaml"), "--output", "here"],
        stage="quickstart",
    )
    chain = {stage: stage_config for stage, _, stage_config in pipeline.stages(config)}
    if name == "demo":
        assert list(chain) == ["prepare", "pretrain", "evaluate"]
        assert chain["pretrain"].tokens == []
    else:
        assert list(chain) == ["prepare", "train-tokenizer", "tokenize", "pretrain", "evaluate"]
        assert chain["pretrain"].tokens == ["here/tokens"] == [chain["tokenize"].output]
    assert chain["pretrain"].scaling.num_workers == 2
    assert (chain["pretrain"].optim.steps == DEMO_STEPS) == (name == "demo")


def test_quickstart_has_no_other_recipe_where_one_is_given(capsys: pytest.CaptureFixture) -> None:
    printed = []
    for given in (["--config", "demo"], ["--config=demo"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["quickstart", *given, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert "output: work/demo" in printed[0]
    assert printed[0] == printed[1]


def test_a_chain_of_mae_alone_makes_no_tokens() -> None:
    flags = ["--config", str(CONFIGS / "quickstart.yaml"), "--output", "here"]
    flags += [f"--pretrain.{name}={json.dumps(value)}" for name, value in MAE.items()]
    config = parse(pipeline.PipelineConfig, flags, stage="pipeline")
    chain = {stage: stage_config for stage, _, stage_config in pipeline.stages(config)}
    assert list(chain) == ["prepare", "pretrain", "evaluate"]
    assert chain["pretrain"].tokens == []
    with pytest.raises(InputError, match=r"store_views = True: .*predicts tokens.*leave it out"):
        list(pipeline.stages(replace(config, store_views=True)))


def test_a_chain_trains_on_the_views_that_it_stores() -> None:
    flags = ["--config", str(CONFIGS / "quickstart.yaml"), "--output", "here"]
    arms = {"mae": MAE, "large": {"model": {"image_size": 128}}}
    flags += ["--store_views", "true", "--tokenize.view_form", "jpeg95", "--arms", json.dumps(arms)]
    config = parse(pipeline.PipelineConfig, flags, stage="pipeline")
    chain = {stage: stage_config for stage, _, stage_config in pipeline.stages(config)}
    stored = chain["tokenize"]
    assert (stored.store_views, stored.view_form, stored.view_size) == ("here/views", "jpeg95", 64)
    trained = ("pretrain", "pretrain mae", "pretrain large")
    assert [chain[stage].views for stage in trained] == [["here/views"], [], []]
    config = replace(
        config, store_views=False, tokenize=replace(config.tokenize, view_form="lossless")
    )
    without = {stage: each for stage, _, each in pipeline.stages(config)}
    assert (without["tokenize"].store_views, without["pretrain"].views) == ("", [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenize.view_form", "jpeg95"], r"tokenize.view_form = 'jpeg95': give --store_views"),
        (["--tokenize.view_size", "64"], r"tokenize.view_size = 64: give --store_views"),
        (["--tokenize.store_views", "there"], r"tokenize.store_views = 'there': .*in views/; give"),
        (["--store_views", "true", "--tokenize.store_views", "there"], r"tokenize.store_views = "),
    ],
)
def test_views_that_a_chain_would_not_store_are_refused_at_once(
    flags: list[str], message: str
) -> None:
    flags = ["--config", str(CONFIGS / "quickstart.yaml"), "--output", "here", *flags]
    with pytest.raises(InputError, match=message):
        parse(pipeline.PipelineConfig, flags, stage="pipeline")


@pytest.mark.parametrize(("num_images", "few"), [(40, True), (63, True), (64, False)])
def test_too_few_images_are_refused_before_the_first_training(
    num_images: int, few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--config", str(CONFIGS / "quickstart.yaml"), "--output", str(tmp_path / "out")]
    arms = {"mae": {**MAE, "data": {"global_batch_size": 256}}} if few else {}
    config = parse(
        pipeline.PipelineConfig, [*flags, "--arms", json.dumps(arms)], stage="quickstart"
    )
    table = SimpleNamespace(num_rows=num_images, class_names=("a", "b"), summary=lambda: "images")
    monkeypatch.setattr("pipelines.prepare.run", lambda *_, **__: table)

    def train(*_: object, **__: object) -> None:
        raise StageFailed("a tokenizer is trained")

    monkeypatch.setattr("pipelines.train_tokenizer.run", train)
    said = (
        r"^train_tokenizer.data.global_batch_size = 64, pretrain.data.global_batch_size = 64, "
        rf"arms.mae.data.global_batch_size = 256: more than the {num_images} images of .*images. "
        r"Give at least 256 images"
    )
    with pytest.raises(InputError if few else StageFailed, match=said if few else "is trained"):
        pipeline.run(config, start_ray=lambda: None)


@pytest.mark.parametrize("arms", [{}, {"mae": MAE}])
def test_images_without_labels_are_trained_on_and_not_probed(
    arms: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--config", str(CONFIGS / "demo.yaml"), "--output", str(tmp_path / "out")]
    config = parse(
        pipeline.PipelineConfig, [*flags, "--arms", json.dumps(arms)], stage="quickstart"
    )
    table = SimpleNamespace(num_rows=500, class_names=(), uri="there", summary=lambda: "images")
    trained = SimpleNamespace(
        mim_accuracy=None, unigram_accuracy=None, steps=9, run=RunDir(str(tmp_path / "run"))
    )
    stages_run = []
    for name, result in (("prepare", table), ("pretrain", trained), ("evaluate", None)):

        def run(*_: object, name: str = name, result: object = result, **__: object) -> object:
            stages_run.append(name)
            return result

        monkeypatch.setattr(f"pipelines.{name}.run", run)
    if arms:
        with pytest.raises(InputError, match=r"arms: mae would be compared .*there has no labels"):
            pipeline.run(config, start_ray=lambda: None)
        assert stages_run == ["prepare"]
        return
    said = pipeline.run(config, start_ray=lambda: None).summary()
    assert stages_run == ["prepare", "pretrain"]
    assert "not probed: that needs labels of two classes" in said
    assert "[3/3] evaluate\n      left out" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_from_a_folder_to_a_reviewed_run(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, _ in list_images()[::10]:
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_image(key))
    command = [
        "quickstart",
        *("--config", str(CONFIGS / "quickstart.yaml")),
        *("--prepare.source", str(tmp_path / "source")),
        *("--output", str(tmp_path / "out")),
        *SMALLER,
        f"--arms={json.dumps({'mae': MAE})}",
    ]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "codes used" in shown
    assert "linear probe" in shown
    assert "beit ui, or make ui in a checkout" in shown
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") >= 1
    table = [line.split() for line in shown.partition("  training ")[2].splitlines()]
    assert [row[0] for row in table if row][1:3] == ["beit", "mae"]

    # The artefacts name each other.
    images = ImageTable.open(str(tmp_path / "out" / "images"))
    tokens = TokenTable.open(str(tmp_path / "out" / "tokens"))
    tokenizer = json.loads((tmp_path / "out" / "tokenizer" / "manifest.json").read_text())
    assert images.num_rows == tokens.num_rows == 401
    assert tokens.image_fingerprint == images.fingerprint
    assert tokens.tokenizer_fingerprint == tokenizer["fingerprint"]

    # It learned: the loss fell, and guesses beat the most frequent token.
    lines = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    periods = [json.loads(line) for line in lines]
    losses = [period["loss"] for period in periods]
    assert losses[-1] < losses[0] - 0.3
    floor = cli_report(tmp_path)["unigram_accuracy"]
    assert periods[-1]["mim_accuracy"] > floor

    # MLflow has a finished run of every stage, and pictures of what was predicted.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(absolute_tracking_uri(""))
    experiment = client.get_experiment_by_name("beit")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 8
    pictures = {
        file.path for run in runs for file in client.list_artifacts(run.info.run_id, "images")
    }
    assert len(pictures) >= 5

    # Once more: nothing is done twice.
    assert cli.main(command) == 0
    again = capsys.readouterr().out
    assert "done already" in again
    assert again.partition("  training ")[2] == shown.partition("  training ")[2]
    record = json.loads((tmp_path / "out" / "chain.json").read_text())["stages"]
    assert len(record) == 8
    assert not any("already" in stage["said"] for stage in record.values())
    # The report alone is written again.
    assert len(client.search_runs([experiment.experiment_id])) == 9


def cli_report(folder: Path) -> dict[str, float]:
    report: dict[str, float] = json.loads((folder / "out" / "run" / "report.json").read_text())
    return report
