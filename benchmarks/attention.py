"""Attention with a bias that learns, forward and backward: the ways in which it can be computed.

    python benchmarks/attention.py [--batch 16] [--heads 12] [--rounds 9] [--output FILE.md]
    python benchmarks/attention.py --device cuda --batch 256

197 tokens of width 64 a head, one bias (1, heads, 197, 197) for the batch, gradients of both:

- sdpa: torch's scaled_dot_product_attention with the bias as its mask, what `beit.vit` calls;
- written: `beit.cpu_attention`, what `beit.vit` calls for eager float training on a CPU;
- compiled: softmax(q k^T + bias) v in plain torch under torch.compile;
- flex: flex_attention, which adds the bias to each logit inside its kernel, under torch.compile.

On CUDA in bfloat16 and wall time, with the peak of allocated memory beyond the inputs; on a CPU in
float32 and CPU-seconds. Each way's output and gradients are first compared with those of float64.
Ways take turns, round by round; the ratio to sdpa is taken within a round, its median reported.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from beit import cpu_attention
from benchmarks.model import machine, timed

TOKENS, WIDTH = 197, 64
Way = Callable[[Tensor, Tensor, int], Tensor]
#: Largest error of outputs and gradients, of the largest value of each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3 * D) -> 3 x (B, heads, T, D / heads), as in `beit.vit`."""
    return qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def joined(out: Tensor) -> Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return out.transpose(1, 2).flatten(2)


def sdpa(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """One call, whichever kernel torch takes."""
    return joined(F.scaled_dot_product_attention(*split(qkv, heads), attn_mask=bias))


def plain(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Written out, for torch.compile."""
    q, k, v = split(qkv, heads)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return joined(logits.softmax(dim=-1) @ v)


def flex(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The bias is looked up for each logit: no array of all logits, nor of their gradient."""

    def add_bias(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[0, head, query, key]

    return joined(flex_attention(*split(qkv, heads), score_mod=add_bias))


def ways(device: torch.device) -> dict[str, Way]:
    """Name to computation; sdpa first."""
    found: dict[str, Way] = {"sdpa": sdpa}
    if device.type == "cpu":
        found["written"] = cpu_attention.attention
    return {**found, "compiled": torch.compile(plain), "flex": torch.compile(flex)}


def results(way: Way, inputs: tuple[Tensor, Tensor, Tensor], heads: int) -> list[Tensor]:
    """Output, gradient of qkv, gradient of the bias."""
    qkv, bias, upstream = inputs
    out = way(qkv, bias, heads)
    return [out, *torch.autograd.grad(out, (qkv, bias), upstream)]


def inputs_of(batch: int, heads: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """qkv, bias and the gradient of the output; the first two want gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv = drawn(batch, TOKENS, 3 * heads * WIDTH).requires_grad_()
    bias = drawn(1, heads, TOKENS, TOKENS).requires_grad_()
    return qkv, bias, drawn(batch, TOKENS, heads * WIDTH)


def error_of(way: Way, heads: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of output and gradients for two images, against float64."""
    inputs = inputs_of(2, heads, dtype, device)
    exact = tuple(t.detach().cpu().double().requires_grad_(t.requires_grad) for t in inputs)
    pairs = zip(results(way, inputs, heads), results(plain, exact, heads), strict=True)
    return max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def peak_bytes(step: Callable[[], object]) -> int:
    """Most memory that a step takes on CUDA beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def report(args: argparse.Namespace, device: torch.device) -> str:
    """The whole result as Markdown."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    inputs = inputs_of(args.batch, args.heads, dtype, device)
    steps: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for name, way in ways(device).items():
        try:
            error = error_of(way, args.heads, dtype, device)
        except Exception as refused:  # a way that this device or build has not
            notes[name] = f"not here: {str(refused).strip().splitlines()[0][:120]}"
            continue
        if not error < TOLERANCE[dtype]:
            notes[name] = f"not measured: off by {error:.2g}"
            continue
        notes[name] = f"{error:.1e}"
        steps[name] = lambda way=way: results(way, inputs, args.heads)
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = timed(steps[name], device)
            seconds[name].append(wall if cuda else cpu)
    unit = "ms" if cuda else "CPU-ms"
    lines = [
        "# Attention with a bias that learns",
        "",
        f"Machine: {machine(device, args.threads)}.",
        f"Command: `python -m benchmarks.attention {' '.join(sys.argv[1:])}`.",
        f"{args.batch} images, {args.heads} heads, {str(dtype).removeprefix('torch.')}, forward "
        "and backward; what the ways are stands at the head of `benchmarks/attention.py`.",
        "",
        f"| way | {unit} an image | x sdpa | peak MB | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, note in notes.items():
        if name not in steps:
            lines.append(f"| {name} | | | | {note} |")
            continue
        each = 1000 * statistics.median(seconds[name]) / args.batch
        pairs = zip(seconds[name], seconds["sdpa"], strict=True)
        ratio = statistics.median(own / sdpa for own, sdpa in pairs)
        memory = f"{peak_bytes(steps[name]) / 1e6:,.0f}" if cuda else ""
        lines.append(f"| {name} | {each:.2f} | {ratio:.2f} | {memory} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses flags, measures, prints and optionally writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = report(args, torch.device(args.device))
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
