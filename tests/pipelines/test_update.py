"""An update of the weights: scheduled rates, fp16 and its loss scale, what a step waits for."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters as dynamo_counters

from beit.mae import Mae, MaeNetwork
from beit.mim import BeitMIM
from beit.objectives import Beit
from beit.optim import parameter_groups
from beit.vit import Block
from pipelines import pretrain
from pipelines.config.pretrain import HealthConfig, OptimConfig
from pipelines.config.train_tokenizer import ScalingConfig
from pipelines.errors import InputError
from pipelines.reading import ingest
from pipelines.training import loop
from pipelines.training.checkpoint import load_newest
from pipelines.training.data import WorkerData
from pipelines.training.distributed import World, autocast, clip_gradients, whole, wrap_model
from pipelines.training.health import HealthMonitor
from pipelines.training.run_dir import RunDir
from pipelines.training.step_metrics import Period, StepMetrics
from pipelines.training.update import adamw, set_rates, update
from pipelines.training.weights_run import TrainPlan
from tests.pipelines.pretrain_fixtures import (
    Killed,
    dies_after,
    events_of,
    metrics_of,
    per_step,
    small_config,
    weight_bytes,
)
from tests.pipelines.test_distributed import SMALL
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
PLAN = TrainPlan(
    total_steps=20, warmup_steps=5, steps_per_epoch=4, flops_per_image=1.0, fingerprints={}
)


class TestRates:
    def optimizer(self, optim):
        model = BeitMIM(**SMALL)
        return adamw(parameter_groups(model, optim.weight_decay, layer_decay=0.5), optim)

    @pytest.mark.parametrize(("start", "end"), [(0.05, 0.2), (0.3, 0.0)])
    def test_weight_decay_is_upstreams_cosine(self, start, end):
        """Its array (`cosine_scheduler` without warm-up), set where there was a decay."""
        optim = OptimConfig(weight_decay=start, weight_decay_end=end)
        optimizer = self.optimizer(optim)
        decays = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        assert any(decays) and not all(decays)
        for step in range(20):
            wanted = end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / 20))
            rates = set_rates(optimizer, optim, PLAN, step)
            assert rates["weight_decay"] == pytest.approx(wanted, rel=1e-12)
            for decaying, group in zip(decays, optimizer.param_groups, strict=True):
                assert group["weight_decay"] == (rates["weight_decay"] if decaying else 0)
                assert group["lr"] == rates["lr"] * group["lr_scale"]

    def test_it_stays_where_no_end_is_given(self):
        optim = OptimConfig()
        optimizer = self.optimizer(optim)
        assert set_rates(optimizer, optim, PLAN, 13).keys() == {"lr"}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05, 0.0}

    def test_a_schedule_from_nothing_is_refused(self):
        with pytest.raises(InputError, match=r"optim\.weight_decay_end = 0\.1: .* raise"):
            OptimConfig(weight_decay=0.0, weight_decay_end=0.1)

    def test_it_is_logged_and_changes_the_weights(self, tables, tmp_path):
        def run(**optim):
            output = tmp_path / f"run{len(optim)}"
            return pretrain.run(
                small_config(tables, output, optim={"steps": 5, "warmup_steps": 1, **optim})
            )

        scheduled, constant = run(weight_decay_end=3.0), run()
        last = metrics_of(scheduled.run_uri)[-1]["weight_decay"]
        assert last == pytest.approx(3.0 - 2.95 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))
        assert "weight_decay" not in metrics_of(constant.run_uri)[-1]
        assert weight_bytes(scheduled.run_uri) != weight_bytes(constant.run_uri)


@pytest.fixture
def small_scale(monkeypatch):
    """A loss scale that is too large at first, and soon grows again until it is too large."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**26, growth_interval=2)
    monkeypatch.setattr(loop.torch.amp, "GradScaler", scaler)


class TestFp16:
    def config(self, tables, output):
        return small_config(tables, output, scaling={"precision": "fp16"})

    def test_skipped_updates_are_counted_told_and_resumed(
        self, tables, tmp_path, monkeypatch, small_scale
    ):
        whole = pretrain.run(self.config(tables, tmp_path / "whole"))
        lines = metrics_of(whole.run_uri)
        skipped = sum(norm is None for line in lines for norm in line["grad_norms"])
        assert 0 < skipped < 12
        assert lines[-1]["skipped_updates"] == skipped
        told = [e for e in events_of(whole.run_uri) if e["event"] == "updates_skipped"]
        assert sum(event["skipped"] for event in told) == skipped
        assert f"{skipped} so far; the loss scale is" in told[-1]["message"]
        assert not [e for e in events_of(whole.run_uri) if e["event"] == "non_finite"]
        state = load_newest(RunDir(whole.run_uri).checkpoints, rejected=print).state
        assert state["precision"] == "fp16"
        assert state["scaler"]["scale"] == lines[-1]["loss_scale"]
        assert state["scaler"]["skipped_updates"] == skipped

        # Died and resumed, the scale goes on: the same updates are left out.
        config = self.config(tables, tmp_path / "run")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", dies_after(6))
            pretrain.run(config)
        resumed = pretrain.run(config)
        assert "resumed" in [event["event"] for event in events_of(resumed.run_uri)]
        assert weight_bytes(resumed.run_uri) == weight_bytes(whole.run_uri)
        assert per_step(resumed.run_uri) == per_step(whole.run_uri)
        assert metrics_of(resumed.run_uri)[-1]["skipped_updates"] == skipped
        newest = load_newest(RunDir(resumed.run_uri).checkpoints, rejected=print)
        assert newest.state["scaler"] == state["scaler"]

    def test_a_start_in_another_precision_is_told(self, tables, tmp_path, monkeypatch):
        config = small_config(tables, tmp_path / "run", optim={"steps": 6, "warmup_steps": 1})
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", dies_after(5))
            pretrain.run(config)
        monkeypatch.setattr(pretrain, "resolve_precision", lambda *_: "bf16")  # another GPU's
        pretrain.run(config)
        [told] = [e for e in events_of(config.output) if e["event"] == "precision_changed"]
        step = told["step"]
        assert told["message"] == f"precision: float32 up to step {step}, bf16 from there"

    def test_it_is_near_float32(self, tables, tmp_path):
        half = pretrain.run(self.config(tables, tmp_path / "half"))
        full = pretrain.run(small_config(tables, tmp_path / "full"))
        found, wanted = ([x for x, _ in per_step(r.run_uri).values()] for r in (half, full))
        assert found != wanted
        assert found == pytest.approx(wanted, abs=0.02)

    def test_only_a_scale_that_cannot_fall_is_ill(self):
        period = Period(
            first_step=0, losses=[1.0], grad_norms=[math.inf], samples=[""], items=1.0, means={},
            perplexity=None, codes_used=None,
        )  # fmt: skip
        monitor = HealthMonitor(HealthConfig(), judged_from=99, unigram_accuracy=None)
        assert monitor.check(period, loss_scale=1024.0) == []
        assert [f.kind for f in monitor.check(period, loss_scale=1.0)] == ["non_finite"]

    def test_tokenizers_are_not_trained_in_it(self):
        with pytest.raises(InputError, match=r"scaling\.precision = 'fp16': choose auto"):
            ScalingConfig(precision="fp16")


def test_what_was_opened_is_closed_where_the_first_checkpoint_fails(tables, tmp_path, monkeypatch):
    closed = []

    def full(self):
        raise OSError("no space left")

    monkeypatch.setattr(loop.LoopState, "save", full)
    for kind in (loop.Saver, WorkerData):
        original = kind.close
        monkeypatch.setattr(
            kind, "close", lambda self, close=original: (closed.append(type(self)), close(self))
        )
    with pytest.raises(OSError, match="no space left"):
        pretrain.run(small_config(tables, tmp_path / "run"))
    assert closed == [WorkerData, loop.Saver]


def objective_and_inputs(kind, device="cpu"):
    """A small objective, and what a step hands it: 4 masked patches of 8."""
    if kind == "mae":
        plain = {**SMALL, "relative_positions": "none", "absolute_positions": True}
        del plain["vocab_size"]
        network = MaeNetwork(**plain, decoder_dim=16, decoder_depth=2, decoder_heads=2)
        objective, targets = Mae(network), None
    else:
        objective = Beit(BeitMIM(**{**SMALL, "depth": 4, "drop_path": 0.1}))
        targets = torch.tensor([1, 2, 3, 4], device=device)
    objective.to(device)
    mask = torch.tensor([[True, False, True, False]] * 2, device=device)
    noise = torch.rand(2, objective.num_branches, 2, device=device)
    pixels = torch.randn(2, 3, 16, 16, device=device)
    return objective, (pixels, mask, targets), {"num_masked": 4, "noise": noise}


@pytest.mark.parametrize("kind", ["beit", "mae"])
def test_what_is_compiled_has_no_breaks_and_is_compiled_once(kind, monkeypatch):
    """With exact masks no shape changes, so nothing is compiled after the first step."""
    torch._dynamo.reset()
    dynamo_counters.clear()
    count = CompileCounter()
    compiled = functools.partialmethod(nn.Module.compile, backend=count)
    monkeypatch.setattr(nn.Module, "compile", compiled)
    objective, inputs, more = objective_and_inputs(kind)
    plain = objective(*inputs, **more)
    wrapped = wrap_model(objective, ALONE, strategy="ddp", compiled=True)
    pieces = [part for part in objective.modules() if part._compiled_call_impl is not None]
    assert len([part for part in pieces if not isinstance(part, Block)]) == 1, "the loss, whole"
    after = []
    for _ in range(3):
        outcome = wrapped(*inputs, **more)
        outcome.sums[0].backward()
        after.append(count.frame_count)
    # Blocks that give all rows and one that gives some, with and without drop-path; the loss.
    assert after[0] <= 5
    assert after[0] == after[-1]
    assert not dynamo_counters["graph_break"]
    torch.testing.assert_close(outcome.sums, plain.sums)


@pytest.mark.parametrize("kind", ["beit", "mae"])
def test_a_step_reads_nothing_back_from_the_device(kind):
    """On torch's meta device, where nothing has a value, whoever asks for one fails."""
    objective, inputs, more = objective_and_inputs(kind, "meta")
    metrics = StepMetrics(2, objective.metrics, SMALL["vocab_size"], torch.device("meta"))
    outcome = objective(*inputs, **more)
    loss = outcome.sums[0] / torch.full((), 4.0, device="meta").clamp(min=1)
    loss.backward()
    metrics.add(loss, outcome.sums, outcome.codes, 4)
    norm = clip_gradients([p for p in objective.parameters() if p.requires_grad], 3.0)
    assert (~torch.isfinite(norm)).float().device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        float(norm)


def update_as_worker(rank, port):
    """One of two processes; in the first update a part of worker 1's gradients is infinite."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(0)
        objective, inputs, more = objective_and_inputs("beit")
        wrapped = wrap_model(objective, world, strategy=strategy, compiled=False)
        optimizer = adamw(parameter_groups(objective.network, 0.05), OptimConfig(lr=1e-2))
        parameters = list(objective.network.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for ill in (True, False):
            before = [whole(p.detach()).clone() for p in parameters]
            with autocast(world, "fp16"):
                loss = wrapped(*inputs, **more).sums[0] / 8
            scaler.scale(loss * math.inf if ill and strategy == "ddp" and rank else loss).backward()
            if ill and strategy == "fsdp" and rank:
                parameters[-1].grad.to_local().fill_(math.inf)  # of this worker's shard alone
            norm = update(optimizer, scaler, parameters, 3.0)
            assert math.isfinite(norm) is not ill
            same = [
                torch.equal(a, whole(p.detach())) for a, p in zip(before, parameters, strict=True)
            ]
            assert all(same) if ill else not all(same)
            assert [float(x) for x in world.gather(torch.tensor(scaler.get_scale()))] == [32.0] * 2
        for parameter in parameters:
            one, other = world.gather(whole(parameter.detach()))
            assert torch.equal(one, other)
            assert parameter.dtype == torch.float32
    dist.destroy_process_group()


@pytest.mark.long
def test_all_workers_leave_the_same_updates_out():
    mp.spawn(update_as_worker, args=(free_port(),), nprocs=2)
