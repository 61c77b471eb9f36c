"""VQ-KD's teacher: what its forward pass costs in a step, and what reading its features would.

    python -m benchmarks.teacher [--batch 8] [--rounds 5] [--threads 1] [--output FILE.md]
    python -m benchmarks.teacher --device cuda --batch 64

ViT-B/16 as teacher and as encoder, decoder of three blocks, 224 pixels, as in the recipe. "step" is
everything but the teacher: forward, loss, backward, AdamW. "read" takes float16 features (196 x 768
a view, or CLIP's 196 x 512) out of an uncompressed Parquet file in the page cache, to the device:
what a cache beside the tokens costs where disk and network are free. CPU-seconds on a CPU, float32;
wall time on CUDA, bfloat16.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from beit.mim import BeitMIM, model_config
from beit.tokenizers.vqkd import FeatureDecoder, VqkdTokenizer
from benchmarks.model import machine, timed

PATCHES, WIDTHS = 196, (768, 512)


def make_step(batch: int, device: torch.device) -> tuple[Callable[[], object], ...]:
    """A step of VQ-KD on given features, and the teacher's forward pass that makes them."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    tokenizer = VqkdTokenizer().to(device)
    decoder = FeatureDecoder(
        num_patches=PATCHES, code_dim=32, dim=768, depth=3, num_heads=12, feature_dim=768
    ).to(device)
    teacher = BeitMIM(**{**model_config("base"), "vocab_size": 0}).to(device).eval()
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8).to(device)
    pixels = images.float() / 127.5 - 1
    features = torch.randn(batch, PATCHES, 768, device=device)
    parameters = [*tokenizer.parameters(), *decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast:
            states = tokenizer.states(images)
            codes = tokenizer.codebook[tokenizer.likeness(states.detach()).argmax(dim=-1)]
            found = decoder(states + (codes - states).detach()).float()
            loss = (1 - F.cosine_similarity(found, features, dim=-1)).mean()
            (loss + F.mse_loss(states, codes)).backward()
        optimiser.step()

    @torch.no_grad()
    def forward() -> None:
        with autocast:
            teacher.features(pixels)

    return step, forward


def reader(width: int, batch: int, folder: str, device: torch.device) -> Callable[[], object]:
    """Reads the features of a batch, written before, to the device."""
    drawn = np.random.default_rng(0).standard_normal((batch, PATCHES * width), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(drawn.astype(np.float16).ravel()),
                                               PATCHES * width)  # fmt: skip
    path = f"{folder}/{width}.parquet"
    table = pa.table({"features": column})
    pq.write_table(table, path, compression="none", use_dictionary=False)

    def read() -> torch.Tensor:
        column = pq.read_table(path).column("features").combine_chunks()
        values = column.flatten().to_numpy().reshape(batch, PATCHES, width)
        return torch.from_numpy(values).to(device)

    return read


def report(args: argparse.Namespace, device: torch.device) -> str:
    """The whole result as Markdown."""
    step, forward = make_step(args.batch, device)
    with tempfile.TemporaryDirectory() as folder:
        parts = {"step without teacher": step, "teacher, forward": forward}
        for width in WIDTHS:
            parts[f"read {PATCHES} x {width}"] = reader(width, args.batch, folder, device)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(-1, args.rounds):
            for name, call in parts.items():
                cpu, wall = timed(call, device)
                if number >= 0:  # the first warms up
                    seconds[name].append(wall if device.type == "cuda" else cpu)
    each = {name: 1000 * statistics.median(taken) / args.batch for name, taken in seconds.items()}
    whole = each["step without teacher"] + each["teacher, forward"]
    unit = "ms" if device.type == "cuda" else "CPU-ms"
    return "\n".join(
        [
            "# VQ-KD's teacher: computed or read",
            "",
            f"Machine: {machine(device, args.threads)}.",
            f"Command: `python -m benchmarks.teacher {' '.join(sys.argv[1:])}`.",
            f"Batches of {args.batch}, medians of {args.rounds} rounds. How: the head of "
            "`benchmarks/teacher.py`.",
            "",
            f"| part | {unit} an image | of the whole step |",
            "| --- | --- | --- |",
            *(f"| {name} | {ms:.2f} | {ms / whole:.1%} |" for name, ms in each.items()),
            "",
        ]
    )


def main() -> None:
    """Parses flags, measures, prints and optionally writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
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
