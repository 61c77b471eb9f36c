"""What holds for BEiT in training holds for every objective: resume, accumulation, workers."""

import math
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from pydantic import TypeAdapter

from beit.foreign import load_whole
from beit.mim import BeitMIM
from beit.weights import load_weights, read_weights_config
from pipelines import export as export_stage
from pipelines import pretrain
from pipelines.config.export import ExportConfig
from pipelines.config.pretrain import MAY_CHANGE, PretrainConfig
from pipelines.errors import InputError
from pipelines.reading import ingest
from pipelines.training import fixed_images
from pipelines.training.checkpoint import load_newest
from pipelines.training.data import WorkerData, open_tables
from pipelines.training.distributed import World
from pipelines.training.fixed_images import FixedImages
from pipelines.training.log import TrainLog
from pipelines.training.objective import build_objective
from pipelines.training.pretraining import input_datasets, make_plan, plan_run
from pipelines.training.run_dir import RunDir
from tests.pipelines.pretrain_fixtures import (
    Killed,
    dies_after,
    events_of,
    metrics_of,
    per_step,
    poison,
    small_config,
    weight_bytes,
)
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("beitv2", "mae")
SECTIONS = {
    "beitv2": {
        "objective": {"kind": "beitv2", "early_layer": 1},
        "masking": {"exact": True},
        "optim": {"beta2": 0.98},
    },
    "mae": {
        "objective": {"kind": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        "model": {
            "absolute_positions": True,
            "relative_positions": "none",
            "layer_scale_init": None,
        },
        "masking": {"kind": "random", "num_masked": 48},
        "tokens": [],
    },
}


def config_for(kind, tables, output, **sections):
    return small_config(tables, output, **{**SECTIONS[kind], **sections})


SHORT = {"steps": 6, "warmup_steps": 2}


def start_workers(work, arguments, count):
    """Children of one process that has imported everything once."""
    multiprocessing.set_forkserver_preload(["pipelines.pretrain", "torch._dynamo"])
    mp.start_processes(work, arguments, nprocs=count, start_method="forkserver")


def losses(uri):
    return [loss for _, (loss, _) in sorted(per_step(uri).items())]


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tables, tmp_path_factory):
    """Name of an objective, and an undisturbed run of it."""
    config = config_for(request.param, tables, tmp_path_factory.mktemp(request.param) / "run")
    return request.param, pretrain.run(config)


def test_it_learns_and_leaves_an_encoder(finished, tables):
    kind, result = finished
    periods = metrics_of(result.run_uri)
    assert result.steps == 12
    assert periods[-1]["loss"] < periods[0]["loss"] - 0.2
    assert periods[-1]["masked_patches"] == (48 if kind == "mae" else 24) * 16 * 4
    model = load_weights(result.weights_uri)
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 65, 32)
    assert result.report["flops_per_image"] > 0
    if kind == "beitv2":
        first = periods[0]
        assert first["loss"] == pytest.approx(
            first["main_loss"] + first["aggregated_loss"], abs=1e-4
        )
        assert first["main_loss"] == pytest.approx(math.log(64), abs=0.5)


@pytest.mark.parametrize("died_at", [2, 8])
def test_it_resumes_bit_for_bit(finished, tables, tmp_path, monkeypatch, died_at):
    kind, whole = finished
    config = config_for(kind, tables, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ingest, "train_batches", dies_after(died_at))
        pretrain.run(config)
    result = pretrain.run(config)
    assert weight_bytes(result.run_uri) == weight_bytes(whole.run_uri)
    assert per_step(result.run_uri) == per_step(whole.run_uri)
    assert [event["event"] for event in events_of(result.run_uri)] == ["resumed"]


def test_accumulation_and_recomputing_change_nothing(finished, tables, tmp_path):
    kind, whole = finished
    scaling = {"accumulate_steps": 3, "activation_checkpointing": True}
    result = pretrain.run(config_for(kind, tables, tmp_path / "run", scaling=scaling))
    assert losses(result.run_uri) == pytest.approx(losses(whole.run_uri), abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_rolls_back_and_skips_the_window(kind, tables, tmp_path, monkeypatch):
    poison(monkeypatch, {5})
    result = pretrain.run(config_for(kind, tables, tmp_path / "run"))
    found, rolled = events_of(result.run_uri)
    assert (found["event"], found["step"]) == ("non_finite", 6)
    assert (rolled["event"], rolled["to_step"], rolled["skipped_batches"]) == ("rolled_back", 4, 4)
    assert len(losses(result.run_uri)) == 12
    assert all(math.isfinite(loss) for loss in losses(result.run_uri))


def test_an_official_file_keeps_what_only_pretraining_needs(finished, tmp_path):
    kind, result = finished
    form = {"beitv2": "unilm", "mae": "mae"}[kind]

    def export(run, **options):
        output = str(tmp_path / f"{Path(run).name}-{options}")
        config = ExportConfig(**{"run": run, "output": output, "format": form, **options})
        assert export_stage.run(config).largest_difference == 0
        return load_whole(output).eval()

    newest = load_newest(RunDir(result.run_uri).checkpoints, rejected=lambda *_: None)
    again = export(result.run_uri, image_size=None)
    assert newest.step == result.steps
    assert state_differs(again.state_dict(), newest.weights) == []
    config = TypeAdapter(PretrainConfig).validate_python(newest.state["config"])
    trained = build_objective(config, 64)
    trained.network.load_state_dict(newest.weights)
    reread = type(trained)(again)
    assert loss_of(reread) == loss_of(trained.eval())
    assert export(result.run_uri, image_size=48).image_size == (48, 48)
    reread = export(result.run_uri, format="hf")
    assert type(reread) is (type(again) if kind == "mae" else BeitMIM)

    alone = shutil.copytree(result.run_uri, tmp_path / "alone")
    shutil.rmtree(alone / "checkpoints")
    with pytest.raises(
        InputError, match=rf"what {kind} trains .* after 12 steps only.*--encoder_o"
    ):
        export(str(alone), image_size=None)
    plain = export(str(alone), encoder_only=True)
    assert type(plain) is BeitMIM
    encoder = load_weights(result.weights_uri).state_dict()
    assert set(state_differs(plain.state_dict(), encoder)) <= {"mask_token"}


def state_differs(found, expected):
    return [n for n in expected if n not in found or not torch.equal(found[n], expected[n])]


@torch.no_grad()
def loss_of(objective):
    """Of a fixed batch of two images, half of each masked."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    mask = torch.arange(64).expand(2, -1) % 2 == 0
    targets = torch.randint(64, (64,), generator=generator)
    return objective(pixels, mask, targets, num_masked=64, noise=None).sums[0].item()


def test_a_probe_does_not_disturb(finished, tables, tmp_path):
    kind, whole = finished
    probe = {"every_steps": 6, "max_share": 1, "num_folds": 2}
    result = pretrain.run(config_for(kind, tables, tmp_path / "run", probe=probe))
    assert [event["step"] for event in events_of(result.run_uri)] == [6, 12]
    assert weight_bytes(result.run_uri) == weight_bytes(whole.run_uri)


def train_as_worker(rank, size, port, tables, root):
    """One of `size` processes that train every objective, without Ray."""
    world = join(rank, size, port)
    for kind in KINDS:
        train(config_for(kind, tables, f"{root}/{kind}", optim=SHORT), world)
    dist.destroy_process_group()


def join(rank, size, port):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    return World(rank, size, torch.device("cpu"))


def train(config, world):
    """What the driver and its workers do, in processes of ours."""
    run = RunDir(config.output)
    plan = make_plan(config, open_tables(config))
    if world.rank == 0:
        run.begin(config, plan.fingerprints, may_change=MAY_CHANGE)
    world.barrier()
    with TrainLog(run, world, launched_at=time.time()) as log:
        pretrain.train_loop(config, plan, world, log)


class TestMae:
    def test_it_has_no_figures_of_tokens(self, tables, tmp_path):
        result = pretrain.run(config_for("mae", tables, tmp_path / "run", optim={"steps": 4}))
        assert (result.mim_accuracy, result.unigram_accuracy) == (None, None)
        assert "accuracy" not in result.summary()
        named = {*metrics_of(result.run_uri)[0], *result.report}
        assert not named & {"mim_accuracy", "predicted_perplexity", "unigram_accuracy"}
        extra = read_weights_config(result.weights_uri)["extra"]
        assert set(extra["fingerprints"]) == {"images", "order"}

    def test_each_epoch_draws_a_view_of_its_own(self, tables, tmp_path):
        config = config_for("mae", tables, tmp_path / "run")
        data = WorkerData(config, World(0, 1, torch.device("cpu")))
        hosts = [batch.host for batch in data.batches([(0, 18)])]
        data.close()
        assert {int(view) for host in hosts for view in host.views} == {0, 1, 2}
        assert all(host.token_ids is None for host in hosts)

    def test_what_it_cannot_do_is_refused_with_the_flags_to_give(self, tables, tmp_path):
        with pytest.raises(ValueError, match=r"absolute_positions=true --model\.relative_pos") as e:
            small_config(tables, tmp_path, objective={"kind": "mae"})
        assert "--masking.kind=random" in str(e.value)
        with pytest.raises(InputError, match=r"tokens = .* reads none"):
            pretrain.run(config_for("mae", tables, tmp_path / "run", tokens=[tables[1]]))
        with pytest.raises(InputError, match=r"tokenizer = '.*/T': this run has no token tables"):
            pretrain.run(config_for("mae", tables, tmp_path / "run", tokenizer="T"))
        with pytest.raises(InputError, match=r"tokens = .*--objective\.kind mae"):
            pretrain.run(small_config(tables, tmp_path / "run", tokens=[]))

    @pytest.mark.parametrize(("value", "said"), [(0.1, True), (None, False)])
    def test_layer_scale_which_its_files_cannot_hold_is_told(
        self, tables, tmp_path, capsys, value, said
    ):
        model = {**SECTIONS["mae"]["model"], "layer_scale_init": value}
        plan_run(config_for("mae", tables, tmp_path / "run", model=model))
        assert ("layer_scale_init = 0.1: MAE has no layer scale" in capsys.readouterr().err) is said

    def test_held_out_images_that_are_not_there_are_refused_at_the_start(self, tables, tmp_path):
        """Pictures and losses want them, whether probes do or not."""
        probe = {"images": str(tmp_path / "typo"), "every_steps": 0}
        with pytest.raises(InputError, match="typo"):
            plan_run(config_for("mae", tables, tmp_path / "run", probe=probe))

    @pytest.mark.parametrize(("count", "shown"), [(5, 5), (20, 8), (64, 8)])
    def test_eight_pictures_are_shown_where_there_are_so_many(
        self, tables, tmp_path, monkeypatch, count, shown
    ):
        config, world = config_for("mae", tables, tmp_path), World(0, 1, torch.device("cpu"))
        data, seen = WorkerData(config, world), []
        monkeypatch.setattr(fixed_images, "FIXED", count)
        monkeypatch.setattr(
            fixed_images.pictures,
            "painted_grid",
            lambda pixels, *_, **__: seen.append(len(pixels)) or Image.new("RGB", (1, 1)),
        )
        FixedImages(config, data, world).log_pictures(build_objective(config, None), Log(), 4)
        data.close()
        assert seen == [shown]

    def test_its_pictures_are_painted(self, tables, tmp_path):
        config, world = config_for("mae", tables, tmp_path), World(0, 1, torch.device("cpu"))
        data, log = WorkerData(config, world), Log()
        fixed = FixedImages(config, data, world)
        assert set(fixed.loss(build_objective(config, None))) == {"fixed/loss"}
        fixed.log_pictures(build_objective(config, None), log, 4)
        data.close()
        assert list(log.pictures) == ["painted"]

    def test_its_only_input_is_the_image_table(self, tables, tmp_path):
        config = config_for("mae", tables, tmp_path)
        assert [d.name for d in input_datasets(config, open_tables(config))] == ["image_table"]


class Log:
    """Keeps pictures."""

    active = True

    def __init__(self):
        self.pictures = {}

    def picture(self, key, image, step):
        assert image.size > (0, 0)
        self.pictures[key] = step


@pytest.mark.slow
def test_three_workers_of_which_one_is_idle_have_the_losses_of_one(tables, tmp_path):
    """Equal up to the order of sums in float32; two of three divide the four shards."""
    start_workers(train_as_worker, (3, free_port(), tables, str(tmp_path / "many")), 3)
    for kind in KINDS:
        output = tmp_path / "one" / kind
        one = pretrain.run(config_for(kind, tables, output, optim=SHORT))
        expected, found = per_step(one.run_uri), per_step(str(tmp_path / "many" / kind))
        assert sorted(found) == list(range(6))
        for step, (loss, samples) in found.items():
            assert samples == expected[step][1]
            assert loss == pytest.approx(expected[step][0], abs=5e-5)
