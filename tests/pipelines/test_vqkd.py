"""Training VQ-KD: what comes out, exact continuation, any number of workers, what is refused."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from beit.classifier import BeitClassifier
from beit.images import decode_image
from beit.views import ViewPolicy, render, sample_view
from beit.weights import load_weights, save_weights
from pipelines.config.train_tokenizer import DataConfig, ModelConfig, VqkdConfig
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store
from pipelines.tables.token_files import Identity
from pipelines.teachers import open_teacher
from pipelines.tokenization.work import Unit, encode_rendered, render_unit
from pipelines.train_tokenizer import run, train_loop
from pipelines.training.data import make_order
from pipelines.training.distributed import World
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir
from pipelines.training.tokenizer_run import begin, make_plan
from pipelines.training.tokenizer_step import build_tokenizer
from pipelines.training.vqkd_learner import Vqkd
from tests.pipelines.test_train_tokenizer import Interrupted, interrupt_at, replaced
from tests.pipelines.tokenizer_fixtures import disc, image_table
from tests.pipelines.vqkd_fixtures import MEAN, STD, make_teacher, vqkd_settings
from tests.servers import free_port


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(70)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(images, teacher, tmp_path_factory):
    """An undisturbed run and its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        metrics = kept_metrics(patch)
        config = vqkd_settings(images, tmp_path_factory.mktemp("vqkd") / "out", teacher)
        result = run(config)
    return config, result, metrics[result.output]


def kept_metrics(patch):
    """metrics.jsonl of runs that end, by output."""
    remove, kept = RunDir.remove, {}

    def keep(self):
        kept[self.uri] = periods(self.at("metrics.jsonl"))
        remove(self)

    patch.setattr(RunDir, "remove", keep)
    return kept


def periods(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_what_comes_out(finished, images, teacher):
    config, result, metrics = finished
    tokenizer = tokenizer_store.load(result.output)
    assert tokenizer.fingerprint() == result.fingerprint
    assert (tokenizer.architecture, tokenizer.interpolation) == ("vqkd", "bicubic")
    assert not tokenizer.has_decoder
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(32))
    source = tokenizer_store.read_manifest(result.output)["source"]
    known = open_teacher(teacher, layer=2, side=4)
    assert source["teacher"]["fingerprint"] == known.fingerprint
    assert source["teacher"]["weights"] == known.weights
    assert "block 2 of 3" in source["teacher"]["name"]
    assert {file.name for file in Path(result.output).iterdir()} == {
        "tokenizer.safetensors", "config.json", "manifest.json", "patches.safetensors",
    }  # fmt: skip
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    for period in metrics:
        assert period["loss"] == pytest.approx(
            period["feature_loss"] + period["commitment"], abs=1e-5
        )
    assert result.scorecard["codes_used"] >= 10
    assert "mse" not in result.scorecard
    assert run(config).already_done


def test_the_teacher_counts_by_its_content(finished, images, teacher, tmp_path):
    """It may lie elsewhere; another one, or another layer, is another tokenizer."""
    config, _, _ = finished
    moved = str(shutil.copytree(teacher, tmp_path / "moved"))
    assert run(dataclasses.replace(config, teacher=moved)).already_done
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"teacher: '\w+' != '\w+'"):
        run(dataclasses.replace(config, teacher=other))
    with pytest.raises(InputError, match="layer: 2 != 3"):
        run(dataclasses.replace(config, layer=3))


def test_it_continues_as_if_never_interrupted(finished, images, teacher, tmp_path, monkeypatch):
    config, result, _ = finished
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    for step in (4, 8, 12):  # before the first checkpoint, between two, after the last step
        interrupt_at(monkeypatch, step)
        with pytest.raises(Interrupted):
            run(config)
    assert run(config).fingerprint == result.fingerprint


def test_cached_tokens_equal_online_tokens(finished, images):
    """What the tokenize stage computes and stores are the tokens of each replayed view."""
    _, result, _ = finished
    tokenizer = tokenizer_store.load(result.output)
    policy = ViewPolicy(seed=3, min_area=0.3)
    identity = Identity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=32,
        grid_size=tokenizer.grid_size,
        image_size=tokenizer.image_size,
        interpolation=tokenizer.interpolation,
        policy=policy.to_dict(),
        views=(5, 7),
        device="cpu",
        precision="float32",
        batch_size=8,
    )
    part = images.parts[0]
    unit = Unit(index=0, part=part.to_dict(), start=3, stop=24)
    rendered = render_unit(images.uri, unit, identity)
    cached = encode_rendered(tokenizer, rendered.pixels, identity)
    assert cached.shape == (21, 2, 16)
    assert len(np.unique(cached)) > 8
    rows = images.read_rows(3, 24).to_pylist()
    for row, tokens in zip(rows, cached, strict=True):
        for index, view_tokens in zip((5, 6), tokens, strict=True):
            image = decode_image(row["image"])
            view = sample_view(policy, row["digest"], index, image.height, image.width)
            pixels = render(image, view, 16, "bicubic").transpose(2, 0, 1)
            online = tokenizer.encode(torch.from_numpy(pixels[None].copy()))
            assert np.array_equal(online[0].numpy(), view_tokens)


def test_a_run_is_the_teacher_that_its_layer_says(teacher):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    model = load_weights(teacher).eval()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    normalised = (pixels / 255 - mean) / std
    for layer in (1, 3, None):
        known = open_teacher(teacher, layer=layer, side=4)
        with torch.no_grad():
            expected = model.features(normalised, layer=layer)[:, 1:]
        torch.testing.assert_close(known.features(pixels), expected)
        assert (known.grid_size, known.dim) == ((4, 4), 24)
    names = {open_teacher(teacher, layer=layer, side=4).fingerprint for layer in (1, 2, 3, None)}
    assert len(names) == 4


def test_a_fine_tuned_run_says_what_it_gives_and_who_taught_it(tmp_path):
    model = BeitClassifier(
        image_size=16, patch_size=4, dim=24, depth=3, num_heads=2, num_classes=5,
        absolute_positions=True, relative_positions="none", layer_scale_init=None,
    )  # fmt: skip
    save_weights(model, tmp_path, extra={"pixel_mean": MEAN, "pixel_std": STD})
    teacher = open_teacher(str(tmp_path), layer=None, side=4)
    assert teacher.name.endswith("patches after block 3 of 3 (labels trained it)")
    assert teacher.fingerprint == open_teacher(str(tmp_path), layer=3, side=4).fingerprint


def learner(images, teacher, world, **changes):
    config = vqkd_settings(images, "unused", teacher, **changes)
    order = make_order(config, images.row_groups.sizes)
    tokenizer = build_tokenizer(config.model, seed=config.seed)
    return Vqkd(tokenizer, open_teacher(teacher, layer=2, side=4), config, order, world)


def test_the_codebook_starts_at_means_of_the_whole_first_batch(images, teacher):
    """Each code is the direction of the mean of the states that are nearest to it."""
    alone = learner(images, teacher, World(0, 1, torch.device("cpu")))
    # A batch in which who is nearest by distance, as k-means has it, is so by angle, too.
    generator = torch.Generator().manual_seed(3)
    batch = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)
    before = alone.tokenizer.codebook.clone()
    alone.prepare(batch, 1)
    assert torch.equal(alone.tokenizer.codebook, before)  # only step 0 places it
    alone.prepare(batch, 0)
    codebook = alone.tokenizer.codebook
    with torch.no_grad():
        states = alone.tokenizer.states(batch).flatten(0, 1)
    codes = (states @ codebook.T).argmax(1)
    assert len(codes.unique()) == 32
    for code in range(32):
        own = torch.nn.functional.normalize(states[codes == code].mean(0), dim=0)
        assert own @ codebook[code] > 0.99
    # Nothing of it depends on the seed of torch's own generator.
    again = learner(images, teacher, World(0, 1, torch.device("cpu")))
    torch.manual_seed(99)
    again.prepare(batch, 0)
    assert torch.equal(again.tokenizer.codebook, codebook)


def test_codes_that_are_never_met_come_back(images, teacher):
    """Half of the codebook is put where one code is; restarts bring it into use again."""

    def train(restart_below):
        vqkd = VqkdConfig(decay=0.5, restart_below=restart_below)
        model = ModelConfig(
            kind="vqkd", image_size=16, patch_size=4, dim=32, depth=2, num_heads=2, vocab_size=64,
            code_dim=8,
        )  # fmt: skip
        one = learner(images, teacher, World(0, 1, torch.device("cpu")), vqkd=vqkd, model=model)
        batch = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
        one.prepare(batch, 0)
        with torch.no_grad():
            one.tokenizer.codebook[32:] = one.tokenizer.codebook[0]
        for step in range(12):
            outcome = one(batch, *one.prepare(batch, 1 + step))
            one.after_step(outcome, 1 + step)
        return len(one.tokenizer.encode(batch).unique()), one.figures(batch, 12)

    torch.manual_seed(0)
    stuck, _ = train(0.0)
    torch.manual_seed(0)
    used, figures = train(0.2)
    assert stuck <= 40
    assert used >= 50
    assert figures["starved_codes"] <= 20


def test_at_most_one_code_in_sixteen_starts_again_in_a_step(images, teacher):
    data = DataConfig(global_batch_size=16, num_shards=8, window=8)
    one = learner(images, teacher, World(0, 1, torch.device("cpu")), data=data)
    batch = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    one.prepare(batch, 0)
    one.usage.zero_()
    one.usage[0] = one.even  # the others are starved
    outcome = one(batch, *one.prepare(batch, 1))
    one.after_step(outcome._replace(codes=torch.zeros_like(outcome.codes)), 1)
    assert (one.usage[1:] == one.even).sum() == 2  # of 32


def keep_starts(path, patch=None):
    """Keeps the codebook that training starts from, as the bytes of a file."""
    place = Vqkd._place_codebook

    def placing(self, batch):
        place(self, batch)
        Path(path).write_bytes(self.tokenizer.codebook.numpy().tobytes())

    (patch.setattr if patch else setattr)(Vqkd, "_place_codebook", placing)


def train_as_worker(rank, size, port, config):
    """One of `size` processes that train, without Ray; worker 0 saves."""
    torch.set_num_threads(1)
    keep_starts(f"{config.output}.{rank}")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    from pipelines.tables.image_table import ImageTable

    world = World(rank, size, torch.device("cpu"))
    images = ImageTable.open(config.images)
    plan = make_plan(config, images)
    run_dir = RunDir(config.output)
    if rank == 0:
        begin(run_dir, config, plan)
    world.barrier()
    with TrainLog(run_dir, world, launched_at=time.time()) as log:
        train_loop(config, plan, world, log)
    dist.destroy_process_group()


@pytest.mark.long
def test_two_workers_compute_what_one_does(finished, tmp_path, monkeypatch):
    """The start of the codebook equal bit for bit; then equal up to the order of sums."""
    config, result, metrics = finished
    alone = dataclasses.replace(config, output=str(tmp_path / "alone"))
    keep_starts(tmp_path / "start", monkeypatch)
    assert run(alone).fingerprint == result.fingerprint
    together = dataclasses.replace(config, output=str(tmp_path / "out"))
    mp.start_processes(
        train_as_worker, (2, free_port(), together), nprocs=2, start_method="forkserver"
    )
    found = periods(RunDir(together.output).at("metrics.jsonl"))
    losses = [loss for period in found for loss in period["losses"]]
    assert losses == pytest.approx(
        [loss for period in metrics for loss in period["losses"]], rel=5e-5
    )
    starts = [(tmp_path / name).read_bytes() for name in ("start", "out.0", "out.1")]
    assert starts[0] == starts[1] == starts[2]
    one, two = tokenizer_store.load(result.output), tokenizer_store.load(together.output)
    torch.testing.assert_close(two.codebook, one.codebook, atol=2e-3, rtol=0)
    pictures = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    assert (one.encode(pictures) == two.encode(pictures)).float().mean() > 0.98


class TestRefusals:
    def test_a_grid_that_does_not_fit(self, images, teacher, tmp_path):
        for model, found, remedy in (
            ({"patch_size": 8}, "2 x 2", r"set model\.patch_size 4"),
            ({"image_size": 18, "patch_size": 6}, "3 x 3",
             r"set model\.image_size and model\.patch_size for 4"),
        ):  # fmt: skip
            config = replaced(vqkd_settings(images, tmp_path, teacher), "model", **model)
            message = rf"teacher = run .*4 x 4 .* {found}; {remedy}"
            with pytest.raises(InputError, match=message):
                run(config)
        assert not list(tmp_path.iterdir())

    def test_no_teacher_or_one_too_many(self, images, teacher, tmp_path):
        config = vqkd_settings(images, tmp_path, teacher)
        with pytest.raises(
            InputError, match=r"teacher = '': VQ-KD learns from one: give --teacher"
        ):
            dataclasses.replace(config, teacher="")
        plain = ModelConfig(image_size=16, patch_size=4)
        with pytest.raises(InputError, match=r"teacher = .*model\.kind = dvae learns from none"):
            dataclasses.replace(config, model=plain)
        with pytest.raises(InputError, match=r"layer = 2: .*leave teacher and layer out"):
            dataclasses.replace(config, model=plain, teacher="")

    def test_what_is_no_teacher(self, images, teacher, tmp_path):
        config = vqkd_settings(images, tmp_path / "out", teacher)
        with pytest.raises(InputError, match=r"layer 4 is none of its blocks 1 to 3"):
            run(dataclasses.replace(config, layer=4))
        with pytest.raises(InputError, match=r"teacher: nothing at .*nowhere"):
            run(dataclasses.replace(config, teacher=str(tmp_path / "nowhere")))
        broken = shutil.copytree(teacher, tmp_path / "broken")
        (broken / "weights.safetensors").unlink()
        with pytest.raises(InputError, match=r"teacher: .*no weights"):
            run(dataclasses.replace(config, teacher=str(broken)))

    def test_more_codes_than_patches_of_a_batch(self, images, teacher, tmp_path):
        config = replaced(vqkd_settings(images, tmp_path / "out", teacher), "model", vocab_size=300)
        with pytest.raises(InputError, match=r"vocab_size = 300: the first batch has only 256"):
            run(config)
        assert not list(tmp_path.iterdir())

    def test_heads_that_do_not_divide(self):
        with pytest.raises(InputError, match=r"model\.num_heads = 5: must divide model\.dim = 64"):
            ModelConfig(kind="vqkd", dim=64, num_heads=5)
