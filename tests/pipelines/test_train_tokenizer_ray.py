"""The same training on two Ray Train workers, and after one of them was killed."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pipelines import train_tokenizer
from pipelines.errors import InputError, StageFailed
from pipelines.tables import tokenizer_store
from pipelines.train_tokenizer import run
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir
from pipelines.training.tokenizer_step import build_tokenizer
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TRAIN_LOOP = train_tokenizer.train_loop


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(70)])


def two_workers(config):
    return replaced(config, "scaling", num_workers=2)


def losses(result):
    """Loss of every period, which the run's directory no longer holds when it is done."""
    return LOSSES[result.output]


@pytest.fixture
def kept_losses(monkeypatch):
    """Keeps metrics.jsonl of runs that end."""
    remove = RunDir.remove

    def keep(self):
        lines = Path(self.at("metrics.jsonl")).read_text().splitlines()
        LOSSES[self.uri] = [json.loads(line)["loss"] for line in lines]
        remove(self)

    monkeypatch.setattr(RunDir, "remove", keep)


LOSSES: dict[str, list[float]] = {}


@pytest.mark.usefixtures("kept_losses")
def test_two_workers_compute_what_one_process_does(images, tmp_path, capfd):
    """Up to the rounding of float32 sums. AdamW turns that of a gradient of 1e-9 into a step of
    the whole learning rate, for single weights: so each tensor is judged by how far training moved
    it, and training by its losses."""
    start = build_tokenizer(settings(images, tmp_path).model, seed=settings(images, tmp_path).seed)
    one = run(settings(images, tmp_path / "alone"))
    result = run(two_workers(settings(images, tmp_path / "together")))
    assert "12/12" in capfd.readouterr().err  # the driver shows the workers' progress
    assert losses(result) == pytest.approx(losses(one), rel=5e-5)
    alone, together = tokenizer_store.load(one.output), tokenizer_store.load(result.output)
    for (name, begin), first, second in zip(
        start.named_parameters(), alone.parameters(), together.parameters(), strict=True
    ):
        moved = (first - begin).norm()
        # The scale of the Laplace likelihood has no part in this loss, and stays.
        assert moved > 0 or name == "decoder.log_scale.weight", name
        assert (first - second).norm() <= 0.01 * moved, name
    pictures = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    assert (alone.encode(pictures) == together.encode(pictures)).float().mean() > 0.98
    assert {path.name for path in Path(result.output).iterdir()} == {
        "tokenizer.safetensors", "config.json", "manifest.json",
    }  # fmt: skip


def killing_loop(flag, config, plan, world, log):
    """`train_loop` whose worker 0 is killed with the eighth step of the first start."""
    period = TrainLog.period

    def dying(self, last, *figures):
        period(self, last, *figures)
        if last == 7 and self.active and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    TrainLog.period = dying
    TRAIN_LOOP(config, plan, world, log)


@pytest.mark.long
def test_a_killed_worker_changes_nothing(images, tmp_path, monkeypatch):
    undisturbed = run(two_workers(settings(images, tmp_path / "undisturbed")))
    flag = str(tmp_path / "killed")
    killing = functools.partial(killing_loop, flag)
    monkeypatch.setattr(train_tokenizer, "train_loop", killing)
    disturbed = run(two_workers(settings(images, tmp_path / "disturbed")))
    assert Path(flag).exists()
    assert disturbed.fingerprint == undisturbed.fingerprint


@pytest.mark.long
def test_a_verdict_of_the_workers_reaches_the_driver(images, tmp_path):
    config = two_workers(settings(images, tmp_path / "out"))
    config = replaced(config, "gate", min_perplexity=31.9)
    with pytest.raises(StageFailed, match="collapsed at step 4"):
        run(config)
    assert tokenizer_store.read_manifest(config.output) is None


@pytest.mark.long
def test_bad_input_that_only_a_worker_sees_ends_the_run_at_once(images, tmp_path):
    config = two_workers(settings(images, tmp_path / "out"))
    config = replaced(config, "model", vocab_size=2000)
    with pytest.raises(InputError, match=r"data\.codebook_images = 70"):
        run(config)


def broken_loop(config, plan, world, log):
    raise RuntimeError("no luck today")


@pytest.mark.long
def test_workers_that_always_fail(images, tmp_path, monkeypatch):
    """They are given up before max_failures: at the same step four times."""
    monkeypatch.setattr(train_tokenizer, "train_loop", broken_loop)
    config = two_workers(settings(images, tmp_path / "out"))
    with pytest.raises(StageFailed, match=r"4 starts in a row .* no luck today"):
        run(config)
    assert len(RunDir(config.output).attempts()) == 4
    with pytest.raises(StageFailed, match=r"scaling\.max_failures = 1 times.* no luck today"):
        run(replaced(config, "scaling", max_failures=1))
