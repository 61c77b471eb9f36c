"""Fine-tuning on small tables: it learns, tests, resumes and refuses as pretraining does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from beit.classifier import BeitClassifier
from beit.weights import load_weights, read_weights_config
from pipelines import finetune
from pipelines.config.checks import to_dict
from pipelines.errors import InputError
from pipelines.training.checkpoint import complete_steps
from pipelines.training.run_dir import RunDir
from tests.pipelines.finetune_fixtures import MEAN, make_inputs, small_finetune, write_encoder
from tests.pipelines.pretrain_fixtures import (
    events_of,
    metrics_of,
    per_step,
    weight_bytes,
    write_images,
)

REPOSITORY = Path(__file__).parents[2]
STEPS = 120  # three seconds: long enough to be killed in mid-run


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An undisturbed run."""
    return finetune.run(small_finetune(inputs, tmp_path_factory.mktemp("finetune") / "run"))


# What the recipes do beside, switched off; and enough steps to learn three colours.
PLAIN = {
    "augment": {"num_operations": 0, "erase_probability": 0.0},
    "mixing": {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
    "optim": {"steps": 60, "warmup_steps": 5, "lr": 1e-2, "layer_decay": 1.0},
    "testing": {"every_epochs": 2.0},
    "checkpoint": {"every_steps": 1000},
}


def test_it_learns_what_the_labels_say(inputs, tmp_path):
    result = finetune.run(small_finetune(inputs, tmp_path / "run", **PLAIN))
    tests = [event for event in events_of(result.run_uri) if event["event"] == "test"]
    assert [event["step"] for event in tests] == [12, 24, 36, 48, 60]
    assert result.test.accuracy > 0.8, "one class in three is 0.33"
    assert result.test.low < result.test.accuracy <= result.test.high
    assert result.test.images == 30
    assert metrics_of(result.run_uri)[-1]["train_accuracy"] > 0.8
    assert "test accuracy" in result.summary()
    network = load_weights(result.weights_uri)
    assert isinstance(network, BeitClassifier)
    extra = read_weights_config(result.weights_uri)["extra"]
    assert extra["class_names"] == ["a", "b", "c"]
    assert extra["pixel_mean"] == list(MEAN)
    assert extra["test"]["accuracy"] == result.test.accuracy


def begin(config, tmp_path):
    """The command of this configuration, as its user gives it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(config)))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "finetune", "--config", str(recipe)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )


def wait_for_checkpoint(command, output, step):
    while command.poll() is None:
        if any(found >= step for found in complete_steps(RunDir(output).checkpoints)):
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended without a checkpoint of step {step}")


def test_a_killed_run_goes_on_bit_for_bit(inputs, tmp_path):
    """SIGKILL, with everything on that draws: views, operations, erasing, mixing, drop-path."""
    steps = {"steps": STEPS, "warmup_steps": 2}
    config = small_finetune(inputs, tmp_path / "run", optim=steps, testing={"every_epochs": 1000.0})
    command = begin(config, tmp_path)
    try:
        wait_for_checkpoint(command, config.output, 4)
    finally:
        command.send_signal(signal.SIGKILL)
        command.wait()
    killed_at = max(complete_steps(RunDir(config.output).checkpoints))
    assert killed_at < STEPS, "it was not killed in mid-run"
    result = finetune.run(config)
    assert "resumed" in [event["event"] for event in events_of(config.output)]

    undisturbed = dataclasses.replace(config, output=str(tmp_path / "undisturbed"))
    whole = finetune.run(undisturbed)
    assert weight_bytes(config.output) == weight_bytes(undisturbed.output)
    assert per_step(config.output) == per_step(undisturbed.output)
    assert result.test == whole.test
    again = finetune.run(config)
    assert (again.resumed_from, again.test) == (STEPS, whole.test)


def losses(uri):
    return [loss for _, (loss, _) in sorted(per_step(uri).items())]


def test_accumulation_and_recomputing_change_nothing(finished, inputs, tmp_path):
    scaling = {"accumulate_steps": 3, "activation_checkpointing": True}
    result = finetune.run(small_finetune(inputs, tmp_path / "run", scaling=scaling))
    assert losses(result.run_uri) == pytest.approx(losses(finished.run_uri), abs=2e-5)


def test_bad_input_is_refused_by_name(finished, inputs, tmp_path):
    write_images(str(tmp_path / "unlabelled"), 8, parts=1, labelled=False)
    write_images(str(tmp_path / "two"), 2, parts=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    silent = write_encoder(tmp_path / "silent")
    text = (tmp_path / "silent" / "config.json").read_text()
    (tmp_path / "silent" / "config.json").write_text(text.replace("pixel_", "x_"))
    for changes, message in [
        ({"run": ""}, "run = '': give"),
        ({"run": str(tmp_path / "nowhere")}, "run = .*nowhere: nothing is there"),
        ({"run": str(tmp_path / "other")}, "describes no BEiT"),
        ({"run": silent}, "data.mean, data.std = null: .* give both"),
        ({"images": str(tmp_path / "unlabelled")}, "8 of 8 images have no label; prepare"),
        ({"test": str(tmp_path / "unlabelled")}, "test = .*: none of its images has a label"),
        ({"test": str(tmp_path / "two")}, "test = .*: has no image of 'c', which the training"),
        (
            {"images": str(tmp_path / "two"), "data": {"global_batch_size": 2, "num_shards": 1}},
            "test = .*: has images of 'c', of which the training table has none",
        ),
        ({"optim": {"steps": 3, "warmup_steps": 3}}, "shorten the warm-up"),
        ({"scaling": {"num_workers": 3}}, "num_workers = 3 does not divide"),
    ]:
        with pytest.raises(InputError, match=message):
            finetune.run(small_finetune(inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists(), "refused before anything was written"
    with pytest.raises(InputError, match=r"data\.num_shards = 4: mixup .* --mixing\.mixup 0"):
        small_finetune(inputs, tmp_path, data={"global_batch_size": 4})
    with pytest.raises(InputError, match=r"data\.mean = .*goes together with data\.std"):
        small_finetune(inputs, tmp_path, data={"mean": (0.5, 0.5, 0.5)})
    other = small_finetune(inputs, finished.run_uri, mixing={"mixup": 0.3})
    with pytest.raises(InputError, match=r"mixing\.mixup: 0\.8 != 0\.3"):
        finetune.run(other)
