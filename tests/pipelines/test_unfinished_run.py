"""What `evaluate` makes of a run that is not finished, and training without the GPU it wants."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import cli
from pipelines.evaluate import _weights
from pipelines.tables.weights_store import weights_fingerprint
from pipelines.training.weights import save_newest

DATA = Path(__file__).parents[1] / "data" / "v0.1.0"


@pytest.fixture
def chain(tmp_path, monkeypatch):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_checkpoint_stands_for_an_unfinished_run(chain, capsys):
    weights = _weights("run_unfinished")
    assert "run_unfinished is not finished: as it was after step 20" in capsys.readouterr().err
    assert weights.uri.endswith("run_unfinished/checkpoints/step_00000020")
    saved = load_file("run_unfinished/checkpoints/step_00000020/model.safetensors")
    state = weights.model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in state)


def test_a_damaged_checkpoint_is_passed_over(chain):
    folder = chain / "run_unfinished/checkpoints"
    shutil.copytree(folder / "step_00000020", folder / "step_00000030")
    (folder / "step_00000030/model.safetensors").write_bytes(b"cut")
    assert save_newest("run_unfinished", str(chain / "out")) == 20
    assert weights_fingerprint(str(chain / "out"))


def test_without_a_checkpoint_the_run_is_named(chain, capsys):
    shutil.rmtree(chain / "run_unfinished/checkpoints/step_00000020")
    flags = ["--run=run_unfinished", "--images=images", "--tracking.enabled=false"]
    assert cli.main(["evaluate", *flags]) == 2
    assert "run_unfinished: the run has no whole checkpoint yet" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["pretrain", "train-tokenizer"])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(chain, stage, capsys):
    recipe = f"--config=recipes/{stage}.yaml"
    assert cli.main([stage, recipe, "--output=new", "--scaling.use_gpu=true"]) == 2
    assert "scaling.use_gpu = True" in capsys.readouterr().err
    assert not (chain / "new").exists()
