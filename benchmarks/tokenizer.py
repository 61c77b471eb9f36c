"""The DALL-E encoder: ours beside a plain call of the same network, same process, interleaved.

    python benchmarks/tokenizer.py [--rounds 5] [--batch 8] [--threads 1] [--compile]
    python benchmarks/tokenizer.py --device cuda [--batch 256]

On a CPU: images per second and per CPU-second, float32, 112 x 112, published size (random
weights), ours against `FlavaImageCodebook` of transformers called as its documentation does. On
CUDA: float16 channels-last, images per second and model FLOP utilisation

    MFU = images/s x 52.12 GFLOP / (FLOP/s of the best large float16 matrix product on this card)

(FLOP = 2 x multiply-accumulate of the convolutions, reference value of the architecture.)
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.tokenizers.dalle import DalleEncoder, DalleTokenizer
from beit.tokenizers.discrete_vae import map_pixels

IMAGE_SIZE = 112


def encoder_flops(encoder: DalleEncoder, size: int) -> int:
    """Multiply-accumulates of all convolutions, times two, for one image."""
    total = 0
    side = size
    for layer in encoder.blocks.children():
        for module in layer.modules():
            if hasattr(module, "w"):
                out_dim, in_dim, kernel, _ = module.w.shape
                total += 2 * side * side * out_dim * in_dim * kernel**2
        if hasattr(layer, "pool"):
            side //= 2
    return total


def flava_key(key: str) -> str:
    """OpenAI's name of a tensor -> transformers'."""
    key = re.sub(r"(group_\d)\.", r"\1.group.", key).replace("res_path.", "res_path.path.")
    return re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", key))


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every call in every round, the calls taking turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm up
    for i in range(rounds):
        names = list(calls) if i % 2 == 0 else list(calls)[::-1]
        for name in names:
            wall, cpu = time.perf_counter(), cpu_seconds()
            calls[name]()
            times[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return times


def on_cpu(batch: int, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """Ours beside the plain call; tokens must be equal."""
    from transformers import FlavaImageCodebookConfig
    from transformers.models.flava.modeling_flava import FlavaImageCodebook

    torch.manual_seed(0)
    tokenizer = DalleTokenizer(image_size=IMAGE_SIZE, has_decoder=False).eval()
    plain = FlavaImageCodebook(FlavaImageCodebookConfig()).eval()
    weights = tokenizer.encoder.state_dict()
    plain.load_state_dict({flava_key(name): tensor for name, tensor in weights.items()})
    for parameter in tokenizer.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)

    def plain_call() -> Tensor:
        with torch.no_grad():
            tokens: Tensor = plain.get_codebook_indices(map_pixels(images)).flatten(1)
            return tokens

    calls = {"plain": plain_call, "ours": lambda: tokenizer.encode(images)}
    if compiled:
        quick = DalleTokenizer(image_size=IMAGE_SIZE, has_decoder=False).eval()
        quick.load_state_dict(tokenizer.state_dict())
        quick.encoder.compile()
        calls["ours, compiled"] = lambda: quick.encode(images)
    reference = plain_call()
    agree = {name: float((call() == reference).float().mean()) for name, call in calls.items()}
    times = interleaved(calls, rounds)
    flops = encoder_flops(tokenizer.encoder, IMAGE_SIZE)
    rows = {}
    for name, pairs in times.items():
        wall = statistics.median(wall for wall, _ in pairs)
        cpu = statistics.median(cpu for _, cpu in pairs)
        ratios = [p[1] / q[1] for p, q in zip(times["plain"], pairs, strict=True)]
        rows[name] = {
            "images_per_second": batch / wall,
            "images_per_cpu_second": batch / cpu,
            "gflops_per_cpu_second": batch * flops / cpu / 1e9,
            "times_plain": statistics.median(ratios),
            "tokens_equal": agree[name],
        }
    return {"gflop_per_image": flops / 1e9, "batch": batch, "rounds": rounds, "results": rows}


def on_cuda(batch: int, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """float16 trunk, channels last, against the card's own matrix product."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(image_size=IMAGE_SIZE, has_decoder=False).eval()
    reference = DalleTokenizer(image_size=IMAGE_SIZE, has_decoder=False).eval()
    reference.load_state_dict(tokenizer.state_dict())
    images = torch.randint(0, 256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    some = images[:16]
    exact = reference.to(device).encode(some.to(device))
    tokenizer.set_precision("float16")
    for parameter in tokenizer.parameters():
        parameter.data = parameter.data.to(device)
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    agree = float((tokenizer.encode(some.to(device)) == exact).float().mean())
    torch.backends.cudnn.benchmark = True
    if compiled:
        tokenizer.encoder.compile(mode="max-autotune-no-cudagraphs")
    resident = images.to(device)

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    peaks = []
    for side in (4096, 8192, 12288):
        a = torch.randn(side, side, device=device, dtype=torch.float16)
        peaks.append(2 * side**3 / seconds(lambda a=a: a @ a, 10))  # type: ignore[misc]
    flops = encoder_flops(reference.encoder, IMAGE_SIZE)
    rates = [batch / seconds(lambda: tokenizer.encode(resident), 5) for _ in range(rounds)]
    rate = statistics.median(rates)
    return {
        "gpu": torch.cuda.get_device_name(),
        "gflop_per_image": flops / 1e9,
        "batch": batch,
        "images_per_second": rate,
        "matmul_tflops": max(peaks) / 1e12,
        "mfu": rate * flops / max(peaks),
        "tokens_equal_to_float32": agree,
        "compiled": compiled,
    }


def main() -> None:
    """Prints the figures as JSON, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        found = on_cuda(arguments.batch or 256, arguments.rounds, compiled=arguments.compile)
    else:
        found = on_cpu(arguments.batch or 8, arguments.rounds, compiled=arguments.compile)
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    machine = {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    text = json.dumps({"machine": machine, **found}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
