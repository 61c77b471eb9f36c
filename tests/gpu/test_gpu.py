"""What holds on a CPU holds on a GPU: the same numbers, and no step that waits for the device.

`make gpu` runs these; everything else leaves them out.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist

from beit.mae import Mae, MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM, model_config
from beit.objectives import Beit, BeitV2
from beit.optim import parameter_groups
from beit.tokenizers.dalle import DalleTokenizer
from beit.tokenizers.vqkd import VqkdTokenizer
from benchmarks import attention
from pipelines import pretrain
from pipelines.reading import ingest
from pipelines.training.distributed import World, wrap_model
from pipelines.training.update import update
from tests.pipelines.pretrain_fixtures import (
    Killed,
    dies_after,
    make_tables,
    per_step,
    small_config,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: see make gpu"),
]
DEVICE = torch.device("cuda")
SMALL = {"image_size": 64, "patch_size": 8, "dim": 128, "depth": 4, "num_heads": 2}
BEIT = {
    **SMALL,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
    "vocab_size": 512,
}
PLAIN = {
    **SMALL,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
}
OBJECTIVES = {
    "beit": lambda: Beit(BeitMIM(**BEIT)),
    "beitv2": lambda: BeitV2(BeitV2MIM(**BEIT, early_layer=2)),
    "mae": lambda: Mae(MaeNetwork(**PLAIN, decoder_dim=64, decoder_depth=2, decoder_heads=2)),
}
BATCH, MASKED = 8, 24


@pytest.fixture(autouse=True)
def _float32_is_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def batch(device):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(BATCH, 3, 64, 64, generator=generator)
    order = torch.rand(BATCH, 64, generator=generator).argsort(dim=1).argsort(dim=1)
    targets = torch.randint(512, (BATCH * MASKED,), generator=generator)
    return pixels.to(device), (order < MASKED).to(device), targets.to(device)


def step(objective, inputs, *, bf16=False):
    """Loss of a batch, its gradients left in the network."""
    pixels, mask, targets = inputs
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        outcome = objective(pixels, mask, targets, num_masked=BATCH * MASKED, noise=None)
    loss = outcome.sums[0] / (BATCH * MASKED)
    loss.backward()
    return loss.detach()


@pytest.fixture(params=OBJECTIVES)
def pair(request):
    """The same objective on the CPU and on the GPU."""
    torch.manual_seed(0)
    on_cpu = OBJECTIVES[request.param]()
    return on_cpu, copy.deepcopy(on_cpu).to(DEVICE)


def test_loss_and_gradients_are_those_of_the_cpu(pair):
    on_cpu, on_gpu = pair
    expected, found = step(on_cpu, batch("cpu")), step(on_gpu, batch(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    for (name, wanted), value in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        if wanted.grad is not None:
            scale = wanted.grad.abs().max().clamp(min=1e-6)
            difference = ((value.grad.cpu() - wanted.grad).abs().max() / scale).item()
            assert difference < 1e-3, name


def test_bfloat16_and_compiled_steps_have_the_loss_of_float32(pair):
    exact = step(pair[0], batch("cpu"))
    loss = step(pair[1], batch(DEVICE), bf16=True)
    torch.testing.assert_close(loss.cpu(), exact, atol=0, rtol=0.02)
    pair[1].compile()
    compiled = step(pair[1], batch(DEVICE), bf16=True)
    torch.testing.assert_close(compiled, loss, atol=0, rtol=0.01)


def test_blocks_that_are_gathered_in_bfloat16_compute_what_autocast_does(pair):
    expected = step(copy.deepcopy(pair[1]), batch(DEVICE), bf16=True)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World(0, 1, DEVICE)
        sharded = wrap_model(pair[1], world, strategy="fsdp", compiled=True, precision="bf16")
        loss = step(sharded, batch(DEVICE), bf16=True)
        gradients = [p.grad for p in sharded.parameters() if p.grad is not None]
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected, atol=0, rtol=0.01)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_a_step_waits_for_nothing(pair):
    objective, inputs = pair[1], batch(DEVICE)
    optimiser = torch.optim.AdamW(parameter_groups(objective.network, 0.05), fused=True)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # makes its state
    step(objective, inputs, bf16=True)
    update(optimiser, scaler, parameters, 3.0)  # makes the optimiser's
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(objective, inputs, bf16=True)
        update(optimiser, scaler, parameters, 3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_with_its_loss_scale_is_near_float32(tmp_path):
    tables = make_tables(tmp_path)

    def losses(precision):
        scaling = {"use_gpu": True, "precision": precision, "tf32": False}
        result = pretrain.run(small_config(tables, tmp_path / precision, scaling=scaling))
        return [loss for _, (loss, _) in sorted(per_step(result.run_uri).items())]

    assert losses("fp16") == pytest.approx(losses("float32"), abs=0.05)


@pytest.mark.parametrize(
    "make",
    [
        partial(DalleTokenizer, image_size=64, hidden_dim=32, vocab_size=512, has_decoder=False),
        partial(VqkdTokenizer, image_size=64, dim=128, depth=2, num_heads=2, vocab_size=512),
    ],
    ids=["dalle", "vqkd"],
)
def test_tokens_of_half_precision_are_those_of_the_cpu(make):
    torch.manual_seed(2)
    on_cpu = make().eval()
    on_gpu = copy.deepcopy(on_cpu)
    on_gpu.set_precision("float16")
    on_gpu.to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=generator)
    equal = on_gpu.encode(pictures.to(DEVICE)).cpu() == on_cpu.encode(pictures)
    assert equal.float().mean() > 0.97
    assert on_gpu.fingerprint() == on_cpu.fingerprint()


@pytest.mark.parametrize("way", attention.ways(DEVICE))
def test_every_way_to_attend_computes_the_same(way):
    computed = attention.ways(DEVICE)[way]
    assert attention.error_of(computed, 2, torch.bfloat16, DEVICE) < 3e-2


def test_a_killed_run_goes_on_with_the_losses_of_the_undisturbed_one(tmp_path, monkeypatch):
    tables = make_tables(tmp_path)

    def losses(name, *, use_gpu=True):
        scaling = {"use_gpu": use_gpu, "precision": "float32", "tf32": False}
        result = pretrain.run(small_config(tables, tmp_path / name, scaling=scaling))
        return [loss for _, (loss, _) in sorted(per_step(result.run_uri).items())]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ingest, "train_batches", dies_after(8))
        losses("killed")
    whole = losses("whole")
    assert losses("killed") == pytest.approx(whole, rel=1e-4)
    assert losses("cpu", use_gpu=False) == pytest.approx(whole, rel=2e-3)


def test_base_fits_and_learns_at_a_batch_of_the_recipes():
    """BEiT-B, 128 images of 224 pixels: what a recipe gives one GPU of 24 GB."""
    torch.manual_seed(0)
    objective = Beit(BeitMIM(**model_config("base"))).to(DEVICE)
    optimiser = torch.optim.AdamW(parameter_groups(objective.network, 0.05), lr=1e-4, fused=True)
    objective.compile()
    pixels = torch.randn(128, 3, 224, 224, device=DEVICE)
    mask = (torch.arange(196, device=DEVICE) < 75).expand(128, -1).contiguous()
    targets = torch.randint(8192, (128 * 75,), device=DEVICE)
    losses = []
    for _ in range(6):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            sums = objective(pixels, mask, targets, num_masked=128 * 75, noise=None).sums
        loss = sums[0] / (128 * 75)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
