"""The same training on two Ray Train workers, and after one of them was killed."""

import os
import signal
from pathlib import Path

import pytest
import ray
import torch

from pipelines import train_tokenizer
from pipelines.errors import InputError, StageFailed
from pipelines.tables import tokenizer_store
from pipelines.train_tokenizer import run
from pipelines.training.ray_workers import ProgressSink, fit_with_ray
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(70)])


def two_workers(config):
    return replaced(config, "scaling", num_workers=2)


@pytest.fixture
def one_thread():
    """As in a worker with one CPU. Sums over more threads round differently, and AdamW's first
    step turns the sign of a gradient of 1e-9 into a whole learning rate."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_workers_compute_what_one_process_does(images, tmp_path, capfd):
    alone = tokenizer_store.load(run(settings(images, tmp_path / "alone")).output)
    result = run(two_workers(settings(images, tmp_path / "together")))
    assert "12/12" in capfd.readouterr().err  # the driver shows the workers' progress
    together = tokenizer_store.load(result.output)
    for (name, first), second in zip(alone.named_parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4, msg=name)
    pictures = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    assert (alone.encode(pictures) == together.encode(pictures)).float().mean() > 0.98
    assert {path.name for path in Path(result.output).iterdir()} == {
        "tokenizer.safetensors", "config.json", "manifest.json", "training.json",
    }  # fmt: skip


class KillingSink(ProgressSink):
    """Kills its worker with the eighth step of the first attempt."""

    def __init__(self, sink, flag):
        super().__init__(sink.label, unit=sink.unit, board=sink.board)
        self.flag = flag

    def update(self, done, **fields):
        super().update(done, **fields)
        if done == 8 and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_killed_worker_changes_nothing(images, tmp_path, monkeypatch):
    undisturbed = run(two_workers(settings(images, tmp_path / "undisturbed")))
    flag = str(tmp_path / "killed")
    worker = train_tokenizer._worker

    def killing(job, progress):
        first = ray.train.get_context().get_world_rank() == 0
        worker(job, KillingSink(progress, flag) if first else progress)

    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    monkeypatch.setattr(train_tokenizer, "_worker", killing)
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


@pytest.mark.long
def test_workers_that_always_fail(tmp_path):
    def broken(job, progress):
        raise RuntimeError(f"no luck with {job}")

    with pytest.raises(StageFailed, match="no luck with this"):
        fit_with_ray(
            broken,
            "this",
            label="test",
            num_workers=1,
            use_gpu=False,
            cpus_per_worker=1,
            max_failures=1,
            state_uri=str(tmp_path / "ray"),
        )
