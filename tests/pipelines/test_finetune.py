"""Fine-tuning on small tables: it learns, tests, resumes and refuses as pretraining does."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from transformers import BeitForImageClassification

from beit.augment import apply_operations, augmentation_of, erasure_of
from beit.classifier import BeitClassifier, Classification
from beit.foreign import write_huggingface, write_unilm
from beit.images import decode_array
from beit.mixing import mix_of, mixed
from beit.positions import resize_bias_table
from beit.tokenizers.vqkd import VqkdTokenizer
from beit.views import render_fast, sample_view
from beit.weights import load_weights, read_weights_config
from pipelines import evaluate, finetune
from pipelines import export as export_stage
from pipelines.config.checks import to_dict
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.export import ExportConfig
from pipelines.config.finetune import MAY_CHANGE
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.tables.weights_store import weights_fingerprint
from pipelines.tracking.served_model import FeatureModel
from pipelines.training.checkpoint import complete_steps
from pipelines.training.data import make_order
from pipelines.training.distributed import World
from pipelines.training.finetuning import (
    build_classifier,
    input_datasets,
    plan_run,
    with_absolute_uris,
)
from pipelines.training.labelled import LabelledData, open_labelled
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir
from tests.pipelines.finetune_fixtures import (
    MEAN,
    STD,
    make_inputs,
    small_finetune,
    write_encoder,
)
from tests.pipelines.pretrain_fixtures import (
    events_of,
    metrics_of,
    per_step,
    weight_bytes,
    write_images,
)
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).parents[2]
STEPS = 80  # two seconds: long enough to be killed in mid-run


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


def test_a_nan_rolls_back_and_skips_the_window(inputs, tmp_path, monkeypatch):
    real = LabelledData._on_device

    def poisoned(self, batch):
        ready = real(self, batch)
        for part in ready.parts:
            part.pixels.mul_(torch.nan if batch.step == 5 else 1)
        return ready

    monkeypatch.setattr(LabelledData, "_on_device", poisoned)
    result = finetune.run(small_finetune(inputs, tmp_path / "run"))
    events = {event["event"]: event for event in events_of(result.run_uri)}
    assert events["non_finite"]["step"] == 6
    rolled = events["rolled_back"]
    assert (rolled["to_step"], rolled["skipped_batches"]) == (4, 2), "the epoch has 6 batches"
    assert len(losses(result.run_uri)) == 12
    assert np.isfinite(losses(result.run_uri)).all()


def test_bad_input_is_refused_by_name(finished, inputs, tmp_path):
    write_images(str(tmp_path / "unlabelled"), 8, parts=1, labelled=False)
    write_images(str(tmp_path / "two"), 2, parts=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    silent = write_encoder(tmp_path / "silent", silent=True)
    tokenizer = str(tmp_path / "vqkd.pth")
    torch.save(
        {"model": VqkdTokenizer(image_size=32, dim=64, depth=1, num_heads=1).state_dict()},
        tokenizer,
    )
    for changes, message in [
        ({"run": ""}, "run = '': give"),
        ({"run": str(tmp_path / "nowhere")}, "run = .*nowhere: nothing is there"),
        ({"run": str(tmp_path / "other")}, "describes no BEiT"),
        ({"run": tokenizer}, r"run = .*not a BEiT; .*a tokenizer's go to beit import-tokenizer"),
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


def test_what_it_reads_is_of_kinds_that_stages_make(inputs, tmp_path):
    """`beit lineage` looks for the makers by these names."""
    config = with_absolute_uris(small_finetune(inputs, tmp_path))
    tables, source, plan = plan_run(config)
    read = input_datasets(config, plan, tables, source)
    assert [(one.name, one.context) for one in read] == [
        ("weights", ""), ("image_table", "training"), ("image_table", "evaluation"),
    ]  # fmt: skip


def data_of(config, rank=0, size=1):
    world = World(rank, size, torch.device("cpu"))
    return LabelledData(config, world, image_size=32, grid_size=(4, 4), mean=MEAN, std=STD)


def whole_steps(config, size, count=3):
    """Pixels, labels and shares of steps, as `size` workers see them together."""
    workers = [data_of(config, rank, size) for rank in range(size)]
    steps = []
    for batches in zip(*(worker.batches([(4, count)]) for worker in workers), strict=True):
        parts = [part for batch in batches for part in batch.parts]
        steps.append(
            [
                torch.cat([getattr(p, name) for p in parts])
                for name in ("pixels", "labels", "shares")
            ]
        )
    for worker in workers:
        worker.close()
    return steps


def test_a_step_does_not_depend_on_the_number_of_workers(inputs, tmp_path):
    config = small_finetune(inputs, tmp_path)
    for one, two in zip(whole_steps(config, 1), whole_steps(config, 2), strict=True):
        for expected, found in zip(one, two, strict=True):
            assert torch.equal(found, expected)


def test_an_idle_worker_sees_nothing_that_counts(inputs, tmp_path):
    config = small_finetune(inputs, tmp_path, scaling={"accumulate_steps": 2})
    idle = next(data_of(config, rank=2, size=3).batches([(0, 1)]))
    assert [part.shares.sum() for part in idle.parts] == [0, 0]
    assert idle.row_ids.size == 0
    sums = Classification(build_classifier(config, make(config)))(
        idle.parts[0].pixels, idle.parts[0].labels, idle.parts[0].shares
    )
    assert sums.tolist() == [0, 0]


def test_a_batch_is_view_operations_erasing_and_mixing_one_after_the_other(inputs, tmp_path):
    config = small_finetune(inputs, tmp_path, augment={"erase_probability": 1.0})
    (pixels, labels, shares), *_ = whole_steps(config, 1, count=1)
    tables = open_labelled(config)
    order = make_order(config, tables.row_group_sizes)
    rows = order.global_batch(*order.locate(4))
    epoch = order.locate(4)[0]
    fill = tuple(min(255, round(255 * value)) for value in MEAN)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    plain = torch.empty(16, 3, 32, 32)
    for i, row in enumerate(rows.tolist()):
        record = tables.images.read_rows(row, row + 1).to_pylist()[0]
        digest, source = record["digest"], decode_array(record["image"])
        assert labels[i, 0] == record["label"]
        view = sample_view(config.policy, digest, epoch, *source.shape[:2])
        what = augmentation_of(digest, epoch, seed=0, size=32, erase_probability=1.0)
        drawn = apply_operations(render_fast(source, view, 32), what.operations, fill)
        plain[i] = (torch.from_numpy(drawn.transpose(2, 0, 1).astype("float32")) - mean) / std
        if what.erased:
            top, left, height, width = what.erased
            noise = erasure_of(digest, epoch, what.erased, seed=0).noise
            plain[i, :, top : top + height, left : left + width] = torch.from_numpy(noise)
    for shard in range(4):
        mine = slice(4 * shard, 4 * shard + 4)
        mix = mix_of(seed=0, step=4, shard=shard, size=(32, 32), mixup=0.8, cutmix=1.0)
        torch.testing.assert_close(pixels[mine], mixed(plain[mine], mix), atol=1e-5, rtol=0)
        assert torch.equal(labels[mine, 1], labels[mine, 0].flip(0))
        assert shares[mine, 0].tolist() == pytest.approx([mix.share] * 4)


def make(config):
    return plan_run(config)[2]


def test_the_head_goes_on_with_the_same_classes_and_positions_grow(finished, inputs, tmp_path):
    first = load_weights(finished.weights_uri).state_dict()
    larger = small_finetune(
        inputs, tmp_path, run=finished.run_uri, model={"image_size": 48, "drop_path": 0.2}
    )
    plan = make(larger)
    assert (plan.keep_head, plan.image_size, plan.grid_size) == (True, 48, (6, 6))
    assert plan.mean == tuple(MEAN)
    network = build_classifier(larger, plan)
    assert torch.equal(network.state_dict()["head.weight"], first["head.weight"])
    table = network.blocks[1].attn.relative_position_bias_table
    own = first["blocks.1.attn.relative_position_bias_table"]
    torch.testing.assert_close(table, resize_bias_table(own, (4, 4), (6, 6)))

    other = str(tmp_path / "other")
    write_images(other, 24, parts=1, class_names=["x", "y", "z"])
    renamed = small_finetune(inputs, tmp_path, run=finished.run_uri, images=other, test="")
    assert not make(renamed).keep_head
    asked = small_finetune(inputs, tmp_path, run=finished.run_uri, model={"head": "fresh"})
    fresh = build_classifier(asked, make(asked)).state_dict()
    assert not torch.equal(fresh["head.weight"], first["head.weight"])
    assert torch.equal(fresh["fc_norm.weight"], first["fc_norm.weight"])
    with pytest.raises(InputError, match=r"test = .*: has images of 'a', 'b', 'c', of which"):
        make(dataclasses.replace(renamed, test=inputs["test"]))


def test_intermediate_fine_tuning_is_the_stage_twice(finished, inputs, tmp_path):
    other = str(tmp_path / "other")
    write_images(other, 48, parts=1, class_names=["x", "y", "z"])
    config = small_finetune(
        {"run": finished.run_uri, "images": other}, tmp_path / "second",
        optim={"steps": 1, "warmup_steps": 0, "lr": 1e-4},
    )  # fmt: skip
    second = finetune.run(config)
    told = read_weights_config(second.weights_uri)["extra"]
    assert told["class_names"] == ["x", "y", "z"]
    assert told["fingerprints"]["weights"] == weights_fingerprint(finished.weights_uri)
    before, after = (load_weights(r.weights_uri).state_dict() for r in (finished, second))
    assert after["head.weight"].abs().max() < 1e-3 < before["head.weight"].abs().max()
    moved = max((before[n] - v).abs().max() for n, v in after.items() if not n.startswith("head."))
    assert 0 < moved < 1e-3, "one small step away from where the first one ended"


@pytest.mark.parametrize("family", ["mae", "hf", "unilm", "cls"])
def test_it_begins_with_what_others_wrote(family, inputs, tmp_path):
    model, given = {}, {}
    if family == "mae":  # as a run of MAE leaves it: no head, absolute positions
        options = {"absolute_positions": True, "relative_positions": "none", "vocab_size": 0}
        uri = write_encoder(tmp_path / "mae", **options, layer_scale_init=None)
    else:
        source = load_weights(inputs["run"])
        uri = str(tmp_path / family)
        if family == "unilm":
            write_unilm(source, uri)
            uri += "/checkpoint.pth"
            given = {"mean": MEAN, "std": STD}
            with pytest.raises(InputError, match=r"data\.mean, data\.std = null"):
                make(small_finetune(inputs, tmp_path / "run", run=uri))
        else:
            write_huggingface(source, uri, mean=MEAN, std=STD)
            model = {"pooling": "cls"} if family == "cls" else {}
    config = small_finetune(
        inputs, tmp_path / "run", run=uri, model=model, data=given, optim={"steps": 4}
    )
    result = finetune.run(config)
    network = load_weights(result.weights_uri)
    assert network.pooling == ("cls" if family == "cls" else "mean")
    assert (network.pos_embed is not None) == (family == "mae")
    assert result.test.images == 30


def test_the_classifier_is_exported_evaluated_and_served(finished, inputs, tmp_path):
    def export(name):
        config = ExportConfig(run=finished.run_uri, output=str(tmp_path / name), format=name)
        assert export_stage.run(config).largest_difference == 0
        return str(tmp_path / name)

    network = load_weights(finished.weights_uri).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    theirs = BeitForImageClassification.from_pretrained(export("hf")).eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        logits = network(pixels)
        torch.testing.assert_close(theirs(pixels).logits, logits, atol=1e-5, rtol=0)
    for name in ("timm", "unilm", "weights"):
        export(name)
    extra = read_weights_config(tmp_path / "weights")["extra"]
    assert extra["class_names"] == ["a", "b", "c"]

    found = evaluate.run(
        EvaluateConfig(
            run=finished.run_uri, images=inputs["images"], num_folds=2, baselines=False,
            layers=[2], tracking=TrackingConfig(enabled=False),
        )
    )  # fmt: skip
    assert found.scores["pretrained"]["linear"].accuracy > 0.5
    accuracy, low, high = found.head
    assert low <= accuracy <= high
    assert f"own head {100 * accuracy:.1f} %" in found.summary()
    marks = json.loads((Path(found.output) / "hits.json").read_text())["head"]
    assert np.mean([mark == "1" for mark in marks]) == pytest.approx(accuracy)

    served = FeatureModel()
    served.load_context(types.SimpleNamespace(artifacts={"weights": finished.weights_uri}))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    said = served.predict(None, images)
    assert said.shape == (2, 3)
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-5)
    assert served.predict(None, images, {"layer": 1}).shape == (2, 32)


@pytest.mark.long
def test_onnx_runtime_gives_its_logits(finished, tmp_path):
    output = str(tmp_path / "onnx")
    config = ExportConfig(run=finished.run_uri, output=output, format="onnx")
    assert export_stage.run(config).largest_difference < 1e-5
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(f"{output}/encoder.onnx")
    found = session.run(["logits"], {"pixels": pixels.numpy()})[0]
    with torch.no_grad():
        logits = load_weights(finished.weights_uri).eval()(pixels)
    np.testing.assert_allclose(found, logits, atol=1e-5)


def train_as_worker(rank, size, port, inputs, output):
    """One of `size` processes that fine-tune, without Ray."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    world = World(rank, size, torch.device("cpu"))
    config = small_finetune(inputs, output)
    run, plan = RunDir(config.output), make(config)
    if rank == 0:
        run.begin(config, plan.fingerprints, may_change=MAY_CHANGE)
    world.barrier()
    with TrainLog(run, world, launched_at=time.time()) as log:
        finetune.train_loop(config, plan, world, log)
    dist.destroy_process_group()


@pytest.mark.long
def test_three_workers_of_which_one_is_idle_have_the_losses_of_one(finished, inputs, tmp_path):
    """Equal up to the order of sums in float32; two of three divide the four shards."""
    output = str(tmp_path / "many")
    mp.spawn(train_as_worker, args=(3, free_port(), inputs, output), nprocs=3)
    expected, found = per_step(finished.run_uri), per_step(output)
    assert sorted(found) == list(range(12))
    for step, (loss, samples) in found.items():
        assert samples == expected[step][1]
        assert loss == pytest.approx(expected[step][0], abs=5e-5)
    tests = [event for event in events_of(output) if event["event"] == "test"]
    assert tests[-1]["images"] == 30
    assert tests[-1]["accuracy"] == pytest.approx(finished.test.accuracy, abs=0.04)


@pytest.mark.ray
@pytest.mark.long
def test_two_workers_of_ray_have_the_losses_of_one(ray_cluster, finished, inputs, tmp_path):
    scaling = {"num_workers": 2, "max_failures": 0}
    result = finetune.run(small_finetune(inputs, tmp_path / "run", scaling=scaling))
    assert losses(result.run_uri) == pytest.approx(losses(finished.run_uri), abs=5e-5)
    assert result.test.accuracy == pytest.approx(finished.test.accuracy, abs=0.04)
    assert result.report["goodput"]["attempts"] == 1
