"""Training end to end from JPEG tables: images/s and waiting, cached tokens beside online ones.

    python -m benchmarks.train --model tiny --batch 8 --steps 3 --rounds 3 [--output FILE.json]
    python -m benchmarks.train --device cuda --model base --batch 256 --precision bf16 --compile

"online" is the same step on the same batches, except that each batch's tokens are computed by
DALL-E's encoder (its real size, random weights: the time is the same) from the tokenizer's view,
as upstream BEiT trains; "cached" reads them from a token table. The two take turns, round by
round; figures are medians over rounds of wall time. Nothing else differs: same images, views,
masks, model, optimizer.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from beit.mim import SIZES
from beit.optim import parameter_groups
from beit.tokenizers.dalle import DalleTokenizer
from benchmarks.ingest import make_jpegs, write_tables
from pipelines.config.pretrain import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    ScalingConfig,
)
from pipelines.reading import ingest
from pipelines.training import goodput
from pipelines.training.data import WorkerData
from pipelines.training.distributed import autocast, join_world, resolve_precision, wrap_model
from pipelines.training.objective import build_objective, flops_per_image
from pipelines.training.update import adamw, update

VOCAB = 8192


class Trainer:
    """One network in training, and its stream of batches."""

    def __init__(self, config: PretrainConfig, *, online: bool, steps: int) -> None:
        self.config = config
        self.world = join_world(use_gpu=config.scaling.use_gpu, in_ray=False)
        self.precision = resolve_precision(config.scaling, self.world)
        scaled = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=scaled)
        self.data = WorkerData(config, self.world)
        self.objective = build_objective(config, VOCAB).to(self.world.device)
        self.optimizer = adamw(
            parameter_groups(self.objective.network, config.optim.weight_decay), config.optim
        )
        self.parameters = list(self.objective.parameters())
        scaling = config.scaling
        wrap_model(self.objective, self.world, strategy=scaling.strategy, compiled=scaling.compile)
        self.tokenizer = None
        if online:
            self.tokenizer = DalleTokenizer(image_size=112, has_decoder=False)
            self.tokenizer.to(self.world.device).eval()
            if self.world.device.type == "cuda":
                self.tokenizer.set_precision("float16")
        self.stream = ingest.train_batches(
            self.data.tables,
            self.data.order,
            image_size=config.model.image_size,
            seed=0,
            start_step=0,
            stop_step=steps,
            masking=config.masking,
            num_threads=self.data.num_threads,
            prefetch_batches=config.data.prefetch_batches,
            token_view=(112, "lanczos") if online else None,
            pin_memory=self.world.device.type == "cuda",
        )

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of `steps` steps, and how many of them were spent waiting for batches."""
        waited = 0.0
        start = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            host = next(self.stream)
            waited += time.perf_counter() - before
            self.step(host)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, waited

    def step(self, host: ingest.Batch) -> None:
        """What `pretrain.train_loop` does between two batches."""
        device = self.world.device
        batch = self.data._on_device(host).parts[0]
        targets = batch.targets
        if self.tokenizer is not None:
            with torch.no_grad():
                token_ids = self.tokenizer.encode(host.token_pixels.to(device, non_blocking=True))
            targets = token_ids.to(device)[batch.mask]
        with autocast(self.world, self.precision):
            outcome = self.objective(
                self.data.normalise(batch.pixels),
                batch.mask,
                targets,
                num_masked=batch.num_masked,
                noise=None,
            )
        self.scaler.scale(outcome.sums[0] / batch.num_masked).backward()
        update(self.optimizer, self.scaler, self.parameters, self.config.optim.clip_grad_norm)


def product_rate(device: torch.device) -> float:
    """TFLOP/s of a matrix product here, in place of a data sheet."""
    size, best = 768, 0.0
    a = torch.ones(size, size, device=device)
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both variants in turn."""
    total = (arguments.rounds + 1) * arguments.steps
    with tempfile.TemporaryDirectory() as directory:
        files = make_jpegs(arguments.images)
        # Repeated rows are read and decoded like any others.
        need = max(arguments.batch, len(files))
        images, tokens = write_tables(Path(directory), (files * -(-need // len(files)))[:need])
        size = {**SIZES[arguments.model]}
        config = PretrainConfig(
            images=images,
            tokens=[tokens],
            output=directory,
            model=ModelConfig(**size, drop_path=0.0),
            data=DataConfig(
                global_batch_size=arguments.batch,
                num_shards=1,
                window=max(256, arguments.batch),
                num_threads=arguments.threads,
                prefetch_batches=arguments.prefetch,
            ),
            optim=OptimConfig(steps=total, warmup_steps=0),
            scaling=ScalingConfig(
                num_workers=0,
                use_gpu=arguments.device == "cuda",
                precision=arguments.precision,
                compile=arguments.compile,
            ),
        )
        names = ["cached"] if arguments.cached_only else ["cached", "online"]
        trainers = {name: Trainer(config, online=name == "online", steps=total) for name in names}
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for round_number in range(arguments.rounds + 1):
            for name, trainer in trainers.items():
                seconds = trainer.run(arguments.steps)
                if round_number > 0:  # the first one warms up
                    rounds[name].append(seconds)
        device = trainers["cached"].world.device
        peak = goodput.device_peak(device, config.scaling.peak_tflops) or product_rate(device)
        for trainer in trainers.values():
            trainer.stream.close()
    flops = flops_per_image(config, VOCAB)
    images_per_round = arguments.steps * arguments.batch
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores, "
        f"{torch.get_num_threads()} torch threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "options": vars(arguments),
        "flops_per_image": flops,
        "peak_tflops": peak,
    }
    for name, measured in rounds.items():
        rate = statistics.median(images_per_round / seconds for seconds, _ in measured)
        result[name] = {
            "images_per_second": rate,
            "data_wait_share": statistics.median(wait / seconds for seconds, wait in measured),
            **goodput.model_flops_utilisation(rate, flops, 1, peak),
            "rounds": measured,
        }
    if "online" in result:
        ratios = [
            online / cached
            for (cached, _), (online, _) in zip(rounds["cached"], rounds["online"], strict=True)
        ]
        result["cached_is_faster_by"] = statistics.median(ratios)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128, help="different pictures")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads")
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "float32", "bf16", "fp16"], default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cached_only", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=1, default=str)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
