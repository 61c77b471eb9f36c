"""FSDP2 in bfloat16: halved traffic, float32 wherever something is summed, kept or judged."""

import copy
import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit.classifier import BeitClassifier, Classification
from beit.vit import BlockNorm, Mlp
from pipelines import finetune, pretrain
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading import ingest
from pipelines.training.checkpoint import load_newest
from pipelines.training.data import WorkerData
from pipelines.training.distributed import autocast, unsharded, wrap_model
from pipelines.training.fixed_images import FixedImages
from pipelines.training.log import TrainLog
from pipelines.training.objective import build_objective
from pipelines.training.run_dir import RunDir
from tests.pipelines.finetune_fixtures import make_inputs, small_finetune
from tests.pipelines.pretrain_fixtures import (
    VOCAB,
    Killed,
    dies_after,
    events_of,
    per_step,
    small_config,
    weight_bytes,
)
from tests.pipelines.test_finetune import make
from tests.pipelines.test_pretrain_objectives import (
    SECTIONS,
    SHORT,
    join,
    losses,
    start_workers,
    train,
)
from tests.pipelines.test_update import ALONE, objective_and_inputs
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"beit": {}, **SECTIONS}
SCALING = {"num_workers": 2, "strategy": "fsdp", "precision": "bf16"}
CLASSIFIER = {
    "image_size": 16,
    "patch_size": 8,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
    "absolute_positions": False,
    "relative_positions": "per_block",
}


class Traffic(TorchDispatchMode):
    """Bytes that collectives take, by their name and the type of the numbers."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            first = next(x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            name = f"{function.__name__.split('.')[0]} {first.dtype}"
            self.sizes[name] = self.sizes.get(name, 0) + first.nbytes
        return function(*args, **(kwargs or {}))


def sharded_config(kind, tables, output):
    more = {
        "optim": SHORT,
        "scaling": {**SCALING, "activation_checkpointing": kind == "mae"},
        "probe": {"every_steps": 6, "max_share": 1, "num_folds": 2},
    }
    return small_config(tables, output, **{**KINDS[kind], **more})


def shard_as_worker(rank, port, tables, root):
    world = join(rank, 2, port)
    for kind in KINDS:
        config = sharded_config(kind, tables, f"{root}/{kind}")
        with Traffic() as traffic:
            train(config, world)
        if rank == 0:
            Path(root, f"{kind}.json").write_text(json.dumps(traffic.sizes))
    config = sharded_config("beit", tables, f"{root}/resumed")
    with pytest.raises(Killed), mock.patch.object(ingest, "train_batches", dies_after(5)):
        train(config, world)
    train(config, world)
    dist.destroy_process_group()


def types_of(module):
    return {parameter.dtype for parameter in module.parameters()}


def loss_of(objective, inputs, more, precision):
    """What a step of one worker, the only one of a group, adds up; gradients stay."""
    with autocast(ALONE, precision):
        loss = objective(*inputs, **more).sums[0]
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("kind", ["beit", "mae"])
def test_what_is_gathered_summed_kept_and_judged(kind):
    objective, inputs, more = objective_and_inputs(kind)
    more["noise"] = None
    objective.eval()  # else drop-path would draw for one and not for the other
    exact, spare = copy.deepcopy(objective), copy.deepcopy(objective)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = wrap_model(objective, ALONE, strategy="fsdp", compiled=False, precision="bf16")
        gathered = {}
        for part in objective.network.modules():
            part.register_forward_pre_hook(
                lambda part, _: gathered.update({type(part): types_of(part)})
            )
        loss = loss_of(wrapped, inputs, more, "bf16")
        with unsharded(objective, spare) as seen, torch.no_grad():
            judged = seen(*inputs, **more).sums[0].item()
        shards = list(objective.parameters())
    finally:
        dist.destroy_process_group()
    assert gathered[BlockNorm] == gathered[Mlp] == {torch.bfloat16}
    assert gathered[nn.LayerNorm] == {torch.float32}  # the last, beside the blocks
    assert loss_of(exact, inputs, more, "float32") == judged != loss
    assert loss == pytest.approx(judged, rel=0.01)
    trained = [p for p in exact.parameters() if p.requires_grad]
    found = [shard.grad.full_tensor() for shard in shards if shard.requires_grad]
    assert {tensor.dtype for tensor in [*shards, *found]} == {torch.float32}
    errors = [a - b.grad for a, b in zip(found, trained, strict=True)]
    whole = get_total_norm([p.grad for p in trained])
    assert get_total_norm(errors) < 0.02 * whole


@pytest.mark.parametrize("layer_scale", [0.1, None])
def test_what_enters_a_block_of_a_classifier_is_float32(layer_scale):
    """Neither a mask token nor positions, which are float32, are added to its patches."""
    network = BeitClassifier(**CLASSIFIER, layer_scale_init=layer_scale)
    plain = copy.deepcopy(network)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Classification(network)
        wrap_model(model, ALONE, strategy="fsdp", compiled=False, precision="bf16")
        entered = []
        for part in network.modules():
            if isinstance(part, BlockNorm):
                part.register_forward_pre_hook(lambda _, args: entered.append(args[0].dtype))
        pixels = torch.randn(8, 3, 16, 16)
        with autocast(ALONE, "bf16"), torch.no_grad():
            found, wanted = network(pixels), plain(pixels)
    finally:
        dist.destroy_process_group()
    assert entered == [torch.float32] * 2 * CLASSIFIER["depth"]
    assert found.float() == pytest.approx(wanted.float(), abs=0.05)


def check_traffic(sizes):
    """Blocks are gathered in bfloat16, what little is left in float32, as all gradients are."""
    assert {name for name in sizes if "reduce_scatter" in name} == {
        "_reduce_scatter_base_ torch.float32"
    }
    blocks, rest = (sizes[f"_allgather_base_ torch.{dtype}"] for dtype in ("bfloat16", "float32"))
    assert blocks > rest


@pytest.fixture(scope="module")
def runs(tables, tmp_path_factory):
    """A folder with a run of each objective by two workers, and one that died and was resumed."""
    root = tmp_path_factory.mktemp("sharded")
    start_workers(shard_as_worker, (free_port(), tables, str(root)), 2)
    return root


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_float32(runs, tables, tmp_path, kind):
    plain = small_config(tables, tmp_path / "plain", **{**KINDS[kind], "optim": SHORT})
    found, wanted = losses(str(runs / kind)), losses(pretrain.run(plain).run_uri)
    assert found != wanted
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_gather_in_bfloat16_and_sum_in_float32(runs, kind):
    check_traffic(json.loads((runs / f"{kind}.json").read_text()))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_probes_are_float32(runs, tables, tmp_path, kind):
    uri = str(runs / kind)
    newest = load_newest(RunDir(uri).checkpoints, rejected=print)
    assert newest.step == SHORT["steps"]
    kept = [*newest.weights.values(), *newest.moments.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}

    config = TypeAdapter(PretrainConfig).validate_python(newest.state["config"])
    objective = build_objective(config, None if kind == "mae" else VOCAB).eval()
    objective.network.load_state_dict(newest.weights)
    [probe] = [event for event in events_of(uri) if event["event"] == "probe"]
    data = WorkerData(config, ALONE)
    expected = FixedImages(config, data, ALONE).loss(objective)
    data.close()
    assert {name: probe["figures"][name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
def test_it_resumes_bit_for_bit(runs):
    whole, resumed = str(runs / "beit"), str(runs / "resumed")
    assert "resumed" in [event["event"] for event in events_of(resumed)]
    assert weight_bytes(resumed) == weight_bytes(whole)
    assert per_step(resumed) == per_step(whole)


@pytest.mark.long
def test_fine_tuning_too(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    plain = finetune.run(small_finetune(inputs, tmp_path / "plain"))
    scaling = {**SCALING, "num_workers": 1}
    config = small_finetune(inputs, tmp_path / "sharded", scaling=scaling)
    run, plan = RunDir(config.output), make(config)
    run.begin(config, plan.fingerprints, may_change=())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with TrainLog(run, ALONE, launched_at=time.time()) as log:
            finetune.train_loop(config, plan, ALONE, log)
    finally:
        dist.destroy_process_group()
    found, wanted = losses(config.output), losses(plain.run_uri)
    assert found != wanted
    assert found == pytest.approx(wanted, rel=2e-3)
    *_, test = [event for event in events_of(config.output) if event["event"] == "test"]
    assert test["accuracy"] == pytest.approx(plain.test.accuracy, abs=0.04)
