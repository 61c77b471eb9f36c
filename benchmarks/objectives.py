"""A training step of BEiT v2 and of MAE beside one of BEiT: time per image, same encoder.

    python -m benchmarks.objectives [--sizes tiny base] [--batch N] [--rounds 7] [--output FILE.md]
    python -m benchmarks.objectives --device cuda

One step is forward, loss, backward and the update (norm, clipping, AdamW), as in training; the
images are the same, the masks are each method's own: 75 of 196 patches (BEiT, BEiT v2), 147 (MAE),
whose decoder is the published one (8 blocks, width 512). Steps take turns, round by round; the
ratio to BEiT is taken within a round and its median reported. Process CPU time on a CPU, float32;
on CUDA wall time, bfloat16, compiled by block as in training.
No tokenizer runs: BEiT's tokens come from a table.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from beit.mae import Mae, MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM, model_config
from beit.objectives import Beit, BeitV2, Objective
from beit.optim import parameter_groups
from benchmarks.model import BATCH, NUM_PATCHES, machine, timed
from pipelines.config.pretrain import OptimConfig
from pipelines.training.distributed import World, wrap_model
from pipelines.training.update import adamw, update

MASKED = {"beit": 75, "beitv2": 75, "mae": 147}


def objective_of(kind: str, size: str) -> Objective:
    """The objective with a network of a named size, as the recipes have it."""
    if kind == "mae":
        config = model_config(size, architecture="plain")
        return Mae(MaeNetwork(**{k: v for k, v in config.items() if k != "vocab_size"}))
    if kind == "beitv2":
        return BeitV2(BeitV2MIM(**model_config(size), early_layer=9))
    return Beit(BeitMIM(**model_config(size, drop_path=0.1)))


def step_of(
    kind: str, size: str, batch: int, device: torch.device
) -> tuple[Callable[[], None], float]:
    """A training step, and what an image of it costs by `flops_per_image`."""
    cuda, masked = device.type == "cuda", MASKED[kind]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
    order = torch.rand(batch, NUM_PATCHES, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (order < masked).to(device)
    targets = torch.randint(8192, (batch * masked,), generator=generator).to(device)
    objective = objective_of(kind, size).to(device).train()
    optimizer = adamw(parameter_groups(objective.network, 0.05), OptimConfig(lr=1e-4))
    parameters = [p for p in objective.network.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    clip = None if kind == "mae" else 3.0
    wrap_model(objective, World(0, 1, device), strategy="ddp", compiled=cuda)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            sums = objective(pixels, mask, targets, num_masked=batch * masked, noise=None).sums
        (sums[0] / (batch * masked)).backward()
        update(optimizer, scaler, parameters, clip)

    return step, objective.flops_per_image(masked)


def measured(size: str, batch: int | None, rounds: int, device: torch.device) -> list[str]:
    """Rows of the table for one size."""
    batch = batch or BATCH[device.type][size]
    inner = 10 if device.type == "cuda" else 1
    steps = {kind: step_of(kind, size, batch, device) for kind in MASKED}
    seconds: dict[str, list[float]] = {kind: [] for kind in MASKED}
    for number in range(-2, rounds):
        kinds = list(MASKED)
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            step = steps[kind][0]
            cpu, wall = timed(lambda step=step: [step() for _ in range(inner)], device)
            if number >= 0:  # the first two warm up
                seconds[kind].append((wall if device.type == "cuda" else cpu) / inner)
    rows = []
    for kind, (_, flops) in steps.items():
        each = statistics.median(seconds[kind]) / batch
        ratios = [a / b for a, b in zip(seconds[kind], seconds["beit"], strict=True)]
        rows.append(
            f"| {size} | {kind} | {batch} | {1000 * each:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {flops / 1e9:.1f} | "
            f"{flops / steps['beit'][1]:.2f} | {flops / each / 1e9:,.0f} |"
        )
    return rows


def main() -> None:
    """Parses flags, measures, prints and optionally writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    unit = "ms" if device.type == "cuda" else "CPU-ms"
    lines = [
        "# A training step of the objectives",
        "",
        f"Machine: {machine(device, args.threads)}.",
        f"Command: `python -m benchmarks.objectives {' '.join(sys.argv[1:])}`.",
        "Time of a step and GFLOP, both of one image, each also as a ratio to BEiT's (median "
        f"of {args.rounds} rounds, smallest to largest). How: see `benchmarks/objectives.py`.",
        "",
        f"| encoder | objective | images | {unit} | x BEiT | GFLOP | x BEiT | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row for size in args.sizes for row in measured(size, args.batch, args.rounds, device)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
