"""Parity with timm's BEiT, where timm is at hand (`make test` puts it into .venv/peers)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit.classifier import BeitClassifier
from beit.foreign import write_timm
from beit.mim import BeitMIM, model_config

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv" / "peers"


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=1.0 if name.endswith("bias_table") else 0.02)
    return model


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PEERS / "timm").is_dir(), reason="timm is not in .venv/peers: make test"
    ),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What a process with timm says of small networks, and of the parts of fine-tuning."""
    small = {**model_config("tiny", image_size=64), "depth": 3}
    plain = {**model_config("tiny", architecture="plain", image_size=(32, 64)), "depth": 3}
    classes = {k: v for k, v in small.items() if k != "vocab_size"}
    models = [
        BeitMIM(**small),
        BeitMIM(**plain),
        BeitClassifier(
            **{**classes, "relative_positions": "per_block"}, num_classes=11, pooling="cls"
        ),
        BeitClassifier(**{**classes, "relative_positions": "per_block"}, num_classes=11),
    ]
    return ask_timm(models, tmp_path_factory.mktemp("timm"))


def test_encoders_and_classifiers_equal_those_of_timm(compared):
    check_equal(compared["networks"], [[2, 17, 192], [2, 9, 192], [2, 11], [2, 11]])


def test_operations_and_erased_boxes_equal_those_of_timm(compared):
    assert compared["operations"] == []
    assert compared["erasing"] == []


def test_mixed_pixels_and_the_loss_of_mixed_labels_equal_those_of_timm(compared):
    assert compared["mixing"] < 1e-6


def test_learning_rates_by_layer_equal_those_of_timm(compared):
    ours, theirs = compared["layer_decay"]["ours"], compared["layer_decay"]["theirs"]
    assert ours == pytest.approx(theirs)
    assert min(ours.values()) == pytest.approx(0.65**4)
    assert ours["head.weight"] == 1


@pytest.mark.long
def test_the_published_size_equals_that_of_timm(tmp_path):
    classes = {k: v for k, v in model_config("tiny", image_size=32).items() if k != "vocab_size"}
    models = [BeitMIM(**model_config("base")), BeitClassifier(**classes, num_classes=3)]
    check_equal(ask_timm(models, tmp_path)["networks"], [[2, 197, 768], [2, 3]])


def ask_timm(models, tmp_path):
    folders = [str(tmp_path / str(i)) for i in range(len(models))]
    for model, folder in zip(models, folders, strict=True):
        write_timm(randomised(model), folder, mean=(0.1, 0.2, 0.3))
    script = Path(__file__).with_name("timm_peer.py")
    done = subprocess.run(
        [sys.executable, str(script), *folders],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_equal(results, shapes):
    for result, shape in zip(results, shapes, strict=True):
        assert result["shape"] == shape
        assert result["names_equal"], result
        assert result["mean"] == [0.1, 0.2, 0.3]
        assert result["size"] > 0.01
        assert result["difference"] < 2e-5, result
