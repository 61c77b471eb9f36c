"""Attention, forward and backward: the ways in which it can be computed.

    python benchmarks/attention.py [--batch 16] [--heads 12] [--rounds 9] [--output FILE.md]
    python benchmarks/attention.py --device cuda --batch 256

Two tables: with a bias that learns, one (1, heads, T, T) for the batch, 197 tokens of width 64 a
head; and on a CPU in bf16 without one, at that size and at those of MAE's encoder (a quarter of the
patches) and of the demo's network. Gradients of all inputs:

- sdpa: torch's scaled_dot_product_attention with the bias as its mask, what `beit.vit` calls;
- written: `beit.cpu_attention`, what `beit.vit` calls for eager training on a CPU;
- compiled: softmax(q k^T + bias) v in plain torch under torch.compile;
- flex: flex_attention, which adds the bias to each logit inside its kernel, under torch.compile.

On CUDA in bfloat16 and wall time, with the peak of allocated memory beyond the inputs; on a CPU in
float32 and CPU-seconds. Each way's output and gradients are first compared with those of float64.
Ways take turns, round by round; the ratio to sdpa is taken within a round, its median reported.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from beit import cpu_attention
from benchmarks.model import machine, timed

Way = Callable[[Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is computed."""

    images: int
    heads: int
    tokens: int = 197
    width: int = 64
    """Of a head."""
    biased: bool = True
    dtype: torch.dtype = torch.float32


UNBIASED = (
    Size(images=16, heads=12, biased=False, dtype=torch.bfloat16),
    Size(images=16, heads=12, tokens=50, biased=False, dtype=torch.bfloat16),
    Size(images=128, heads=4, tokens=17, width=32, biased=False, dtype=torch.bfloat16),
)
#: Largest error of outputs and gradients, of the largest value of each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3 * D) -> 3 x (B, heads, T, D / heads), as in `beit.vit`."""
    return qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def joined(out: Tensor) -> Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return out.transpose(1, 2).flatten(2)


def sdpa(qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """One call, whichever kernel torch takes."""
    return joined(F.scaled_dot_product_attention(*split(qkv, heads), attn_mask=bias))


def plain(qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Written out, for torch.compile."""
    q, k, v = split(qkv, heads)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return joined(logits.softmax(dim=-1) @ v)


def flex(qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The bias is looked up for each logit: no array of all logits, nor of their gradient."""

    def add_bias(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if bias is None else score + bias[0, head, query, key]

    return joined(flex_attention(*split(qkv, heads), score_mod=add_bias))


def ways(device: torch.device) -> dict[str, Way]:
    """Name to computation; sdpa first."""
    found: dict[str, Way] = {"sdpa": sdpa}
    if device.type == "cpu":
        found["written"] = cpu_attention.attention
    return {**found, "compiled": torch.compile(plain), "flex": torch.compile(flex)}


Inputs = tuple[Tensor, Tensor | None, Tensor]


def results(way: Way, inputs: Inputs, heads: int) -> list[Tensor]:
    """Output, gradient of qkv, gradient of the bias where there is one."""
    qkv, bias, upstream = inputs
    out = way(qkv, bias, heads)
    wanted = (qkv,) if bias is None else (qkv, bias)
    return [out, *torch.autograd.grad(out, wanted, upstream)]


def inputs_of(size: Size, device: torch.device) -> Inputs:
    """qkv, bias and the gradient of the output; the first two want gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, size.dtype)

    qkv = drawn(size.images, size.tokens, 3 * size.heads * size.width).requires_grad_()
    bias = drawn(1, size.heads, size.tokens, size.tokens).requires_grad_() if size.biased else None
    return qkv, bias, drawn(size.images, size.tokens, size.heads * size.width)


def error_of(way: Way, size: Size, device: torch.device) -> float:
    """Largest relative error of output and gradients for two images, against float64."""
    qkv, bias, upstream = inputs_of(dataclasses.replace(size, images=2), device)
    exact = (_exact(qkv), None if bias is None else _exact(bias), _exact(upstream))
    pairs = zip(
        results(way, (qkv, bias, upstream), size.heads),
        results(plain, exact, size.heads),
        strict=True,
    )
    return max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _exact(values: Tensor) -> Tensor:
    return values.detach().cpu().double().requires_grad_(values.requires_grad)


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
    parts = [
        "# Attention",
        f"Machine: {machine(device, args.threads)}.\n"
        f"Command: `python -m benchmarks.attention {' '.join(sys.argv[1:])}`.\n"
        "Forward and backward; what the ways are stands at the head of `benchmarks/attention.py`.",
        "## With a bias that learns",
        table(Size(images=args.batch, heads=args.heads, dtype=dtype), args.rounds, device),
    ]
    if not cuda:
        parts.append("## Without a bias, in bf16")
        parts += [table(size, args.rounds, device) for size in UNBIASED]
    return "\n\n".join(parts) + "\n"


def table(size: Size, rounds: int, device: torch.device) -> str:
    """Each way at one size, in turns."""
    cuda = device.type == "cuda"
    inputs = inputs_of(size, device)
    steps: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for name, way in ways(device).items():
        try:
            error = error_of(way, size, device)
        except Exception as refused:  # a way that this device or build has not
            notes[name] = f"not here: {str(refused).strip().splitlines()[0][:120]}"
            continue
        if not error < TOLERANCE[size.dtype]:
            notes[name] = f"not measured: off by {error:.2g}"
            continue
        notes[name] = f"{error:.1e}"
        steps[name] = lambda way=way: results(way, inputs, size.heads)
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = timed(steps[name], device)
            seconds[name].append(wall if cuda else cpu)
    unit = "ms" if cuda else "CPU-ms"
    lines = [
        f"{size.images} images, {size.tokens} tokens, {size.heads} heads of width {size.width}, "
        f"{str(size.dtype).removeprefix('torch.')}:",
        "",
        f"| way | {unit} an image | x sdpa | peak MB | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, note in notes.items():
        if name not in steps:
            lines.append(f"| {name} | | | | {note} |")
            continue
        each = 1000 * statistics.median(seconds[name]) / size.images
        pairs = zip(seconds[name], seconds["sdpa"], strict=True)
        ratio = statistics.median(own / sdpa for own, sdpa in pairs)
        memory = f"{peak_bytes(steps[name]) / 1e6:,.0f}" if cuda else ""
        lines.append(f"| {name} | {each:.2f} | {ratio:.2f} | {memory} | {note} |")
    return "\n".join(lines)


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
