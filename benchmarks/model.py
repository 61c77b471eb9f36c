"""A training step: our BEiT beside that of transformers (and timm, where it is at hand).

    python benchmarks/model.py [--sizes tiny base] [--rounds 9] [--threads 1] [--output FILE.md]

One step is forward, cross-entropy over the masked patches, backward, AdamW; 75 of 196 patches
masked at most, as the blockwise masks fall (ragged counts), vocabulary 8,192, drop-path 0.1, the
same inputs and optimiser for all. Variants run interleaved in one process, round by round, in an
order that rotates; the ratio to ours is taken within a round and its median over rounds reported,
so that other work on the machine, which hits all variants of a round alike, drops out. On a CPU
the figure is process CPU time (all threads), on CUDA wall time between synchronisations.

On CUDA it measures bf16 autocast with torch.compile and reports model FLOP/s utilisation:
MFU = images/s x FLOPs per image (forward and backward, matrix products and attention only, by
the formulas of `flops_per_image`) / the peak of the card, once with the data-sheet peak and once
with the best rate of a large bf16 matrix product here; `--encoder` adds the DALL-E encoder in
fp16, channels last, against the same two.

timm has no MIM head: its encoder gets one of ours, on the masked patches only. It is included
where `.venv/peers` holds it (see tests/beit/test_timm.py), in the same process, last imported.
"""

import argparse
import gc
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.convert import to_huggingface
from beit.masking import blockwise_mask
from beit.mim import BeitMIM, model_config
from beit.optim import parameter_groups
from pipelines.training.goodput import known_peak

NUM_PATCHES, MEAN_MASKED, VOCAB = 196, 74.47, 8192
BATCH = {"cpu": {"tiny": 32, "small": 16, "base": 8, "large": 4}}
BATCH["cuda"] = {"tiny": 512, "small": 384, "base": 256, "large": 128}
PEERS = Path(__file__).parents[1] / ".venv" / "peers"


def flops_per_image(size: str, num_masked: float = MEAN_MASKED) -> float:
    """Forward and backward FLOPs (2 per multiply-add) of one image in our network.

    A block is 24 N d^2 + 4 N^2 d; the last one computes proj and MLP for masked rows only
    (18 of the 24). Backward is twice forward, less the pixels' gradient, which nobody takes.
    """
    config = model_config(size)
    d, depth, n = config["dim"], config["depth"], NUM_PATCHES + 1
    blocks = depth * (24 * n * d**2 + 4 * n**2 * d) - 18 * (n - num_masked) * d**2
    patches = 2 * NUM_PATCHES * 768 * d
    return 3 * (blocks + patches + 2 * num_masked * d * VOCAB) - patches


@dataclass
class Step:
    """One variant: a network, its optimiser, and how its loss is computed."""

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[], Tensor]
    optimiser: torch.optim.Optimizer

    def run(self) -> float:
        """One training step; the loss, fetched so that the device is done."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.item()


def batch_of(size: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, masks and targets that every variant gets."""
    count = BATCH[device.type][size]
    rng = np.random.default_rng(0)
    masks = np.stack([blockwise_mask((14, 14), 75, generator=rng) for _ in range(count)])
    mask = torch.from_numpy(masks).flatten(1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 224, 224, generator=generator)
    targets = torch.randint(VOCAB, (int(mask.sum()),), generator=generator)
    return pixels.to(device), mask.to(device), targets.to(device)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    """The same optimiser for all: groups as in pretraining, fused where the device has it."""
    return torch.optim.AdamW(parameter_groups(network, 0.05), lr=1e-4, fused=True)


def make(name: str, size: str, device: torch.device, bf16: bool) -> Step:
    """The variant called `name` ("ours", "transformers eager", ...)."""
    config = model_config(size, drop_path=0.1)
    reference = BeitMIM(**config)
    reference.init_weights(torch.Generator().manual_seed(0))
    pixels, mask, targets = batch_of(size, device)
    count = int(mask.sum())
    if name.startswith("ours"):
        network: nn.Module = reference
        call = torch.compile(network) if "compile" in name else network

        def forward() -> Tensor:
            return F.cross_entropy(call(pixels, mask, num_masked=count), targets)

    elif name.startswith("transformers"):
        network = transformers_network(reference, name.split()[1])
        call = torch.compile(network) if "compile" in name else network

        def forward() -> Tensor:
            return call(pixels, bool_masked_pos=mask, labels=targets).loss

    else:
        network = TimmMIM(reference)

        def forward() -> Tensor:
            return F.cross_entropy(network(pixels, mask), targets)

    network.to(device).train()

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return forward()

    return Step(name, list(network.parameters()), loss, adamw(network))


def transformers_network(reference: BeitMIM, attention: str) -> nn.Module:
    """transformers' BeitForMaskedImageModeling with the same weights."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    state, config = to_huggingface(reference)
    return BeitForMaskedImageModeling.from_pretrained(
        None, config=BeitConfig(**config), state_dict=state, attn_implementation=attention
    )


class TimmMIM(nn.Module):
    """timm's encoder with one shared bias, a mask token and a head on the masked patches."""

    def __init__(self, reference: BeitMIM) -> None:
        super().__init__()
        from timm.models.beit import Beit

        config = reference.config()
        self.encoder = Beit(
            img_size=config["image_size"],
            embed_dim=config["dim"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            init_values=config["layer_scale_init"],
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
            drop_path_rate=config["drop_path"],
            num_classes=0,
            global_pool="",
        )
        self.mask_token, self.lm_head = reference.mask_token, reference.lm_head
        state = reference.state_dict()
        self.encoder.load_state_dict({k: state[k] for k in self.encoder.state_dict()})

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Logits of the masked patches."""
        encoder = self.encoder
        x = encoder.patch_embed(pixels)
        x = torch.where(mask[:, :, None], self.mask_token, x)
        x = torch.cat((encoder.cls_token.expand(len(x), -1, -1), x), dim=1)
        bias = encoder.rel_pos_bias()
        for block in encoder.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return self.lm_head(encoder.norm(x)[:, 1:][mask])


def timm_at_hand() -> bool:
    """Makes timm importable if .venv/peers holds it (its torchvision lacks operators here)."""
    if not (PEERS / "timm").is_dir():
        return False
    sys.path.append(str(PEERS))
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_SCHEMAS"] = schemas  # they live as long as the library object
    return True


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """CPU seconds of all threads and wall seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_matmul(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Best FLOP/s of a square matrix product on this machine (per CPU-second on a CPU)."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    rates = []
    for _ in range(repeats):
        cpu, wall = timed(lambda: a @ a, device)
        rates.append(2 * size**3 / (wall if device.type == "cuda" else cpu))
    return max(rates)


def measure(size: str, names: list[str], device: torch.device, rounds: int, bf16: bool) -> list:
    """Rows (name, ms per image, images/s, ratio to ours with its range, loss of the first step)."""
    steps = [make(name, size, device, bf16) for name in names]
    inner = 10 if device.type == "cuda" else 1
    losses = {step.name: step.run() for step in steps}  # also warm-up
    for step in steps:
        step.run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for step in steps[number % len(steps) :] + steps[: number % len(steps)]:
            gc.collect()
            cpu, wall = timed(lambda step=step: [step.run() for _ in range(inner)], device)
            seconds[step.name].append((wall if device.type == "cuda" else cpu) / inner)
    rows = []
    count = BATCH[device.type][size]
    for name in names:
        ratios = [x / ours for x, ours in zip(seconds[name], seconds[names[0]], strict=True)]
        median = statistics.median(seconds[name])
        rows.append(
            {
                "name": name,
                "ms": 1000 * median / count,
                "rate": count / median,
                "ratio": statistics.median(ratios),
                "range": (min(ratios), max(ratios)),
                "gflops": flops_per_image(size) * count / median / 1e9,
                "loss": losses[name],
            }
        )
    return rows


def masks_per_second(rounds: int = 9, count: int = 1000) -> float:
    """Blockwise masks a core draws in a CPU-second, median over rounds."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(count):
            blockwise_mask((14, 14), 75, generator=rng)
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def encoder_row(device: torch.device) -> str:
    """The DALL-E encoder in fp16, channels last, on CUDA: images/s and share of the ceilings."""
    from beit.tokenizers.dalle import DalleEncoder

    encoder = DalleEncoder().to(device, torch.float16).to(memory_format=torch.channels_last)
    compiled = torch.compile(encoder, mode="max-autotune-no-cudagraphs")
    images = torch.rand(256, 3, 112, 112, device=device) * 0.8 + 0.1
    images = images.half().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(3):
            compiled(images)
        wall = statistics.median(timed(lambda: compiled(images), device)[1] for _ in range(10))
    ceiling = peak_matmul(device, torch.float16, 8192, 20)
    rate = 256 / wall * 52.119e9
    return (
        f"DALL-E encoder, fp16 channels last, compiled: {256 / wall:,.0f} images/s, "
        f"{rate / 1e12:.0f} TFLOP/s, {rate / ceiling:.0%} of the measured matmul ceiling."
    )


def machine(device: torch.device, threads: int) -> str:
    """What the figures are for, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        model = fields.get("model name", model)
        known = ("avx512f", "avx512_bf16", "amx_bf16")
        flags = ", " + " ".join(f for f in known if f in fields.get("flags", "").split())
    return f"{model}{flags}, {os.cpu_count()} cores, {threads} thread(s), torch {torch.__version__}"


def report(args: argparse.Namespace, device: torch.device) -> str:
    """The whole result as Markdown."""
    cuda = device.type == "cuda"
    names = ["ours", "transformers eager", "transformers sdpa"]
    if cuda:
        names = ["ours compile", "ours", "transformers eager", "transformers sdpa"]
    if args.compile and not cuda:
        names.append("ours compile")
    if timm_at_hand():
        names.append("timm encoder + our head")
    lines = [
        "# Training step of BEiT",
        "",
        f"Machine: {machine(device, args.threads)}.",
        f"Command: `python benchmarks/model.py {' '.join(sys.argv[1:])}`.",
        "How: see the head of `benchmarks/model.py`. x = time of the variant over ours, median of "
        f"{args.rounds} rounds (smallest to largest): above 1, ours is faster.",
    ]
    dtype = torch.bfloat16 if cuda else torch.float32
    ceiling = peak_matmul(device, dtype, 8192 if cuda else 1536, 20)
    peak = known_peak(torch.cuda.get_device_name(device)) if cuda else None
    unit = "" if cuda else " per CPU-second"
    lines.append(f"Matrix products reach {ceiling / 1e9:,.0f} GFLOP/s{unit} ({dtype}).")
    for size in args.sizes:
        rows = measure(size, names, device, args.rounds, bf16=cuda)
        flops = flops_per_image(size)
        lines += [
            "",
            f"## {size}, batch {BATCH[device.type][size]}, "
            + ("bf16 autocast" if cuda else "float32")
            + f", {flops / 1e9:.2f} GFLOP an image",
            "",
            f"| variant | ms{unit.replace('per ', '')} per image | images/s{unit} | x ours | "
            "GFLOP/s | of the matmul rate | loss of step 1 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            low, high = row["range"]
            share = f"{row['gflops'] * 1e9 / ceiling:.0%}"
            if peak:
                share += f", MFU {row['gflops'] * 1e9 / (peak * 1e12):.0%}"
            lines.append(
                f"| {row['name']} | {row['ms']:.1f} | {row['rate']:.2f} | {row['ratio']:.2f} "
                f"({low:.2f} to {high:.2f}) | {row['gflops']:.0f} | {share} | {row['loss']:.4f} |"
            )
    lines += ["", f"Blockwise masks (14 x 14, 75): {masks_per_second():,.0f} per CPU-second."]
    if cuda and args.encoder:
        lines.append(encoder_row(device))
    if not cuda and args.bf16:
        fast = measure("tiny", ["ours"], device, args.rounds, bf16=True)[0]
        slow = measure("tiny", ["ours"], device, args.rounds, bf16=False)[0]
        lines.append(
            f"bf16 autocast on this CPU, tiny: {fast['ms'] / slow['ms']:.2f} x the time of float32."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses flags, measures, prints and optionally writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="CPU: add our compiled step")
    parser.add_argument("--bf16", action="store_true", help="CPU: add bf16 against float32")
    parser.add_argument("--encoder", action="store_true", help="CUDA: add the DALL-E encoder")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = report(args, torch.device(args.device))
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
