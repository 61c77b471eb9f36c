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


def test_encoders_and_classifiers_equal_those_of_timm(tmp_path):
    small = {**model_config("tiny", image_size=64), "depth": 3}
    plain = {**model_config("tiny", architecture="plain", image_size=(32, 64)), "depth": 3}
    classes = {k: v for k, v in small.items() if k != "vocab_size"}
    models = [
        BeitMIM(**small),
        BeitMIM(**plain),
        BeitClassifier(**{**classes, "relative_positions": "per_block"}, num_classes=11),
    ]
    check_equal(models, [[2, 17, 192], [2, 9, 192], [2, 11]], tmp_path)


@pytest.mark.long
def test_the_published_size_equals_that_of_timm(tmp_path):
    check_equal([BeitMIM(**model_config("base"))], [[2, 197, 768]], tmp_path)


def check_equal(models, shapes, tmp_path):
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
    results = json.loads(done.stdout.splitlines()[-1])
    for result, shape in zip(results, shapes, strict=True):
        assert result["shape"] == shape
        assert result["names_equal"], result
        assert result["mean"] == [0.1, 0.2, 0.3]
        assert result["size"] > 0.01
        assert result["difference"] < 2e-5, result
