"""Training a tokenizer: what comes out, exact continuation, refusals, collapse, workers."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from beit.images import decode_image
from beit.views import render, sample_view
from pipelines.config.checks import flatten, to_dict
from pipelines.config.common import CheckpointConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.config.train_tokenizer import (
    DataConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScalingConfig,
    TrainTokenizerConfig,
    deciding_options,
)
from pipelines.errors import InputError, StageFailed
from pipelines.reading.encoded_rows import open_training_tables
from pipelines.reading.ingest import train_batches
from pipelines.tables import tokenizer_store
from pipelines.train_tokenizer import run
from pipelines.training import checkpoint
from pipelines.training.data import make_order
from pipelines.training.dvae_learner import (
    AveragedWeights,
    RelaxedVae,
    cosine_between,
    relaxation,
    relaxation_noise,
)
from pipelines.training.log import TrainLog
from pipelines.training.tokenizer_run import OLD_RECORD
from pipelines.training.tokenizer_step import build_tokenizer, view_policy
from tests.pipelines.tokenizer_fixtures import disc, image_table


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(70)])


def settings(images, output, **changes):
    """Twelve steps of a network that trains in a second."""
    base = TrainTokenizerConfig(
        images=images.uri,
        output=str(output),
        log_every=4,
        model=ModelConfig(
            image_size=16, patch_size=4, dim=48, vocab_size=32, encoder_blocks=1, decoder_blocks=1
        ),
        loss=LossConfig(likelihood="mse", kl_warmup_steps=4, temperature_steps=10),
        data=DataConfig(global_batch_size=16, num_shards=4, window=8, codebook_images=70),
        optim=OptimConfig(steps=12, lr=2e-3, ema_decay=0.9, clip_grad_norm=1.0),
        scaling=ScalingConfig(num_workers=0),
        checkpoint=CheckpointConfig(every_steps=5),
        gate=GateConfig(min_perplexity=2, min_codes=4, grace_steps=0, num_images=40),
        tracking=TrackingConfig(enabled=False),
    )
    return dataclasses.replace(base, **changes)


def replaced(config, section, **changes):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **changes)}
    )


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An undisturbed run."""
    config = settings(images, tmp_path_factory.mktemp("tokenizer") / "out")
    return config, run(config)


def test_what_comes_out(images, finished):
    _, result = finished
    assert not result.already_done
    tokenizer = tokenizer_store.load(result.output)
    assert tokenizer.fingerprint() == result.fingerprint
    assert tokenizer.grid_size == (4, 4)
    manifest = tokenizer_store.read_manifest(result.output)
    assert manifest["source"]["image_table"] == images.fingerprint
    assert manifest["source"]["options"]["optim.lr"] == 2e-3
    assert manifest["scorecard"] == result.scorecard
    assert result.scorecard["codes_used"] >= 20
    assert result.scorecard["perplexity"] > 4
    assert result.scorecard["mse"] < 0.05
    assert result.scorecard["num_images"] == 40
    # Checkpoints are gone; nothing else was left.
    assert {path.name for path in Path(result.output).iterdir()} == {
        "tokenizer.safetensors", "config.json", "manifest.json",
    }  # fmt: skip
    summary = result.summary()
    assert "perplexity" in summary
    assert "\n" not in summary
    assert result.fingerprint in summary


def test_again_says_that_it_is_done(finished):
    config, result = finished
    again = run(config)
    assert again.already_done
    assert again.fingerprint == result.fingerprint
    # How it was computed may differ, and is not asked again.
    assert run(replaced(config, "checkpoint", every_steps=3)).already_done
    assert run(replaced(config, "data", num_threads=3)).already_done


def test_other_settings_are_refused_by_name(images, finished, tmp_path):
    config, _ = finished
    with pytest.raises(InputError, match=r"optim\.lr: 0\.002 != 0\.001"):
        run(replaced(config, "optim", lr=1e-3))
    other = image_table(str(tmp_path / "other"), [disc(seed) for seed in range(100, 170)])
    with pytest.raises(InputError, match=f"image_table: .* != '{other.fingerprint}'"):
        run(dataclasses.replace(config, images=other.uri))


def test_same_seed_same_weights(images, finished, tmp_path):
    config, result = finished
    assert run(dataclasses.replace(config, output=str(tmp_path / "a"))).fingerprint == (
        result.fingerprint
    )
    other = dataclasses.replace(config, output=str(tmp_path / "b"), seed=1)
    assert run(other).fingerprint != result.fingerprint
    threads = replaced(config, "data", num_threads=3, prefetch_batches=1)
    assert run(dataclasses.replace(threads, output=str(tmp_path / "c"))).fingerprint == (
        result.fingerprint
    )


class Interrupted(Exception):
    """Stands for a process that dies."""


def interrupt_at(monkeypatch, step):
    """The next run dies when it has logged this step."""
    original = TrainLog.period

    def period(self, last, *figures):
        original(self, last, *figures)
        if last + 1 >= step:
            monkeypatch.setattr(TrainLog, "period", original)
            raise Interrupted

    monkeypatch.setattr(TrainLog, "period", period)


def test_continues_as_if_never_interrupted(images, finished, tmp_path, monkeypatch):
    config, result = finished
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    root = str(tmp_path / "out" / "checkpoints")
    for step in (4, 8, 12):  # before the first checkpoint, between two, after the last step
        interrupt_at(monkeypatch, step)
        with pytest.raises(Interrupted):
            run(config)
        assert tokenizer_store.read_manifest(config.output) is None
    assert checkpoint.complete_steps(root) == [5, 10]
    # The newest is damaged: the one before it serves.
    weights = tmp_path / "out" / "checkpoints" / "step_00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(config).fingerprint == result.fingerprint
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_run_of_an_earlier_version_goes_on(images, finished, tmp_path, monkeypatch):
    """It left one record with what it was made from, and checkpoints."""
    config, result = finished
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    interrupt_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        run(config)
    for path in Path(config.output).iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    source = tokenizer_store.read_manifest(result.output)["source"]
    record = Path(config.output, OLD_RECORD)
    record.write_text(json.dumps({"source": source, "mlflow_run_id": ""}))
    with pytest.raises(InputError, match="seed: 0 != 3"):
        run(dataclasses.replace(config, seed=3))
    started = []
    with monkeypatch.context() as patch:
        start = TrainLog.start
        patch.setattr(TrainLog, "start", lambda self, at: started.append(at) or start(self, at))
        assert run(config).fingerprint == result.fingerprint
    assert started == [5]
    assert not record.exists()


def test_begun_with_other_settings(images, tmp_path, monkeypatch):
    config = settings(images, tmp_path / "out")
    interrupt_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        run(config)
    with pytest.raises(InputError, match="seed: 0 != 3"):
        run(dataclasses.replace(config, seed=3))
    imported = tmp_path / "imported"
    tokenizer_store.save(
        build_tokenizer(config.model, seed=0), str(imported), source={"stage": "import-tokenizer"}
    )
    with pytest.raises(InputError, match="made by 'import-tokenizer'"):
        run(dataclasses.replace(config, output=str(imported)))


def test_training_beats_the_start(images, tmp_path):
    short = settings(images, tmp_path / "short")
    longer = replaced(
        replaced(short, "optim", steps=120), "loss", temperature_steps=80, kl_weight=0.5
    )
    longer = dataclasses.replace(longer, output=str(tmp_path / "longer"))
    before, after = run(short).scorecard, run(longer).scorecard
    assert after["mse"] < 0.9 * before["mse"]
    assert after["codes_used"] >= 20


@pytest.mark.parametrize("architecture", ["dvae", "dalle"])
def test_logit_laplace_and_dalle(images, tmp_path, architecture):
    config = settings(
        images,
        tmp_path / "out",
        model=ModelConfig(
            architecture=architecture,
            image_size=16,
            patch_size=8,
            dim=16,
            hidden_dim=8,
            init_dim=4,
            blocks_per_group=1,
            vocab_size=16,
            encoder_blocks=1,
            decoder_blocks=1,
        ),
        loss=LossConfig(likelihood="logit_laplace", kl_warmup_steps=2, temperature_steps=4),
        gate=GateConfig(min_perplexity=1, min_codes=1, grace_steps=0, num_images=16),
    )
    config = replaced(replaced(config, "optim", steps=4), "checkpoint", every_steps=2)
    result = run(config)
    assert tokenizer_store.describe(result.output).config["architecture"] == architecture
    assert math.isfinite(result.scorecard["mse"])


def test_collapse_stops_the_run(images, tmp_path):
    config = replaced(settings(images, tmp_path / "out"), "gate", min_perplexity=31.9)
    with pytest.raises(StageFailed, match=r"collapsed at step 4: perplexity .* loss\.kl_weight"):
        run(config)
    assert tokenizer_store.read_manifest(config.output) is None
    # Within the grace steps it is only judged at the end.
    config = replaced(config, "gate", grace_steps=12)
    with pytest.raises(StageFailed, match="on 40 images"):
        run(config)
    assert tokenizer_store.read_manifest(config.output) is None
    # A lower bound lets the finished training pass without doing it again.
    assert run(replaced(config, "gate", min_perplexity=2)).scorecard["perplexity"] < 31.9


def test_loss_that_is_not_finite(images, tmp_path):
    config = replaced(
        settings(images, tmp_path / "out"), "optim", lr=1e30, min_lr=1e30, clip_grad_norm=None
    )
    with pytest.raises(StageFailed, match=r"the loss is (nan|inf) at step .* optim\.lr"):
        run(config)


def test_bad_settings_are_named(images, tmp_path):
    config = settings(images, tmp_path / "out")
    with pytest.raises(InputError, match="global_batch_size = 80 exceeds the 70 rows"):
        run(replaced(config, "data", global_batch_size=80))
    with pytest.raises(InputError, match=r"codebook_images = 1: 16 patches are too few"):
        run(replaced(config, "data", codebook_images=1))
    for name in ("images", "output"):
        with pytest.raises(InputError, match=f"{name} = '': give a path or URI"):
            run(dataclasses.replace(config, **{name: ""}))
    with pytest.raises(InputError, match="no finished image table"):
        run(dataclasses.replace(config, images=str(tmp_path / "nowhere")))
    for section, field, value in (
        ("model", "image_size", 18),
        ("model", "vocab_size", 70_000),
        ("model", "architecture", "vqgan"),
        ("loss", "end_temperature", 2.0),
        ("loss", "likelihood", "l2"),
        ("data", "global_batch_size", 15),
        ("optim", "warmup_steps", 12),
        ("optim", "ema_decay", 1.0),
        ("scaling", "num_workers", -1),
        ("checkpoint", "every_steps", 0),
        ("gate", "num_images", 0),
    ):
        with pytest.raises(InputError, match=rf"{section}\.{field} = {value!r}"):
            replaced(config, section, **{field: value})
    with pytest.raises(InputError, match=r"data\.num_shards = 4: .* scaling\.num_workers = 3"):
        replaced(config, "scaling", num_workers=3)


def test_options_that_decide(images, tmp_path):
    config = settings(images, tmp_path)
    deciding = deciding_options(config)
    assert {"seed", "optim.lr", "data.window", "views.min_area", "loss.kl_weight"} <= set(deciding)
    assert not {"images", "output", "data.num_threads", "tracking.uri"} & set(deciding)
    assert set(deciding) < set(flatten(to_dict(config)))
    json.dumps(deciding)


def test_schedules():
    assert cosine_between(0, num_steps=10, start=1, end=1 / 16) == 1
    assert cosine_between(5, num_steps=10, start=1, end=0) == pytest.approx(0.5)
    assert cosine_between(10, num_steps=10, start=1, end=1 / 16) == 1 / 16
    assert cosine_between(0, num_steps=0, start=1, end=0.5) == 0.5
    default = TrainTokenizerConfig(images="a", output="b")
    # DALL-E's: temperature 1 to 1/16 in 150,000 steps, KL weight 0 to 6.6 in 5,000.
    assert relaxation(default, 0) == (1.0, 0.0)
    assert relaxation(default, 2500)[1] == pytest.approx(3.3)
    assert relaxation(default, 75_000)[0] == pytest.approx((1 + 1 / 16) / 2)
    assert relaxation(default, 150_000) == (1 / 16, 6.6)


def test_kl_is_weighted_as_dalle_states_it():
    """Whole bound over the number of pixel values: beta / 192 a token at stride 8."""
    model = ModelConfig(
        architecture="dalle", image_size=16, hidden_dim=8, init_dim=4, vocab_size=16
    )
    config = TrainTokenizerConfig(
        images="i", output="o", model=model, loss=LossConfig(likelihood="mse")
    )
    relaxed = RelaxedVae(
        build_tokenizer(model, seed=0), config, shards=range(1), shard_batch_size=2
    )
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    noise = torch.ones(2, 16, 2, 2)
    loss, terms, codes, _ = relaxed(pictures, noise, torch.tensor(1.0), torch.tensor(6.6))
    total, reconstruction, kl = terms
    assert loss.item() == pytest.approx(total.item())
    assert total.item() == pytest.approx((reconstruction + 6.6 / 192 * kl).item())
    assert codes.shape == (8,)


def test_averaged_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = AveragedWeights(model, decay=0.5)
    expected = 0.0
    for step in range(20):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-5)
    other = AveragedWeights(torch.nn.Linear(1, 1, bias=False), decay=0.5)
    other.restore(average.state())
    other.copy_to(model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_noise_does_not_depend_on_the_number_of_workers():
    def noise(shards, step=3, seed=0):
        return relaxation_noise(
            seed=seed, step=step, shards=shards, shape=(2, 4, 2, 2), device="cpu"
        )

    whole = noise(range(4))
    assert torch.equal(whole, torch.cat([noise(range(2)), noise(range(2, 4))]))
    assert whole.shape == (8, 4, 2, 2)
    for other in (noise(range(4), step=4), noise(range(4), seed=1), noise(range(4, 8))):
        assert not torch.equal(whole, other)


def test_views_follow_the_order(images):
    config = settings(images, "unused")
    order = make_order(config, images.row_groups.sizes)
    policy = view_policy(config.views, seed=5)

    data = open_training_tables(images.uri, policy=policy)

    def batches(start, stop, *, rank=0, num_ranks=1, **changes):
        with train_batches(
            data,
            order,
            image_size=16,
            interpolation="lanczos",
            fast=False,
            grid_size=(4, 4),
            seed=0,
            start_step=start,
            stop_step=stop,
            rank=rank,
            num_ranks=num_ranks,
            **changes,
        ) as stream:
            return [batch.pixels for batch in stream]

    steps = 2 * order.steps_per_epoch + 1
    whole = batches(0, steps)
    for batch, step in ((whole[0], 0), (whole[-1], steps - 1)):
        epoch, step_in_epoch = order.locate(step)
        for pixels, row in zip(batch, order.global_batch(epoch, step_in_epoch), strict=True):
            record = images.read_rows(row, row + 1).to_pylist()[0]
            image = decode_image(record["image"])
            view = sample_view(policy, record["digest"], epoch, image.height, image.width)
            expected = render(image, view, 16, "lanczos").transpose(2, 0, 1)
            assert np.array_equal(pixels.numpy(), expected)
    halves = [
        batches(0, steps, rank=rank, num_ranks=2, num_threads=3, prefetch_batches=1)
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))
    later = batches(3, steps, prefetch_batches=7)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], later, strict=True))


def test_initial_weights_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    model = ModelConfig(image_size=16, patch_size=4, dim=8, vocab_size=16)
    first, second = build_tokenizer(model, seed=1), build_tokenizer(model, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (
        first.fingerprint() == second.fingerprint() != build_tokenizer(model, seed=2).fingerprint()
    )
