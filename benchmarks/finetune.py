"""Fine-tuning on the bundled emoji: from pretrained weights, beside random initialisation.

    python benchmarks/finetune.py --work /tmp/finetune [--pretrain_steps 500] [--epochs 8]

One process, no Ray. Groups of emoji (one drawing in six skin tones) lie on one side only: 30 % are
the test. MAE is pretrained on the images of the others, without their labels; then both networks
are fine-tuned on one image of each of their groups, for three seeds of head, order and augmentation
(and of the initial weights where they are random). Interrupted, it goes on. Prints Markdown.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch

from beit.images import image_digest
from beit.mae import MaeNetwork
from beit.weights import save_weights
from pipelines import finetune, pretrain
from pipelines.config import finetune as tuning
from pipelines.config import pretrain as training
from pipelines.config.tracking import TrackingConfig
from pipelines.preparation.sample_images import UNLABELLED, group_of, list_images, read_image
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import commit_manifest, split_position
from pipelines.training.testing import TestScore

MODEL = {
    "image_size": 64, "patch_size": 8, "dim": 128, "depth": 4, "num_heads": 4,
    "absolute_positions": True, "relative_positions": "none", "layer_scale_init": None,
}  # fmt: skip
DECODER = {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
HELD_OUT, SEEDS = 0.3, (0, 1, 2)
QUIET = {"tracking": TrackingConfig(enabled=False)}


def write_tables(work: Path) -> dict[str, str]:
    """The three tables by name; made once."""
    keys = [key for key, _ in list_images() if category(key) != UNLABELLED]
    tested = {key for key in keys if split_position(group_of(key)) < HELD_OUT}
    rest = [key for key in keys if key not in tested]
    chosen = {
        "unlabelled": rest,
        "labelled": sorted({group_of(key): key for key in reversed(rest)}.values()),
        "test": sorted(tested),
    }
    names = sorted({category(key) for key in keys})
    for name, members in chosen.items():
        if (work / name / "manifest.json").exists():
            continue
        rows = [row(key, names) for key in members]
        part = write_part(str(work / name), "part-00000.parquet", rows, row_group_bytes=250_000)
        commit_manifest(
            str(work / name), parts=[part], class_names=names, source={}, options={}, rejected={},
            num_items=len(rows),
        )  # fmt: skip
    print({name: len(members) for name, members in chosen.items()}, flush=True)
    return {name: str(work / name) for name in chosen}


def category(key: str) -> str:
    return key.partition("/")[0]


def row(key: str, names: list[str]) -> ImageRow:
    data = read_image(key)
    return ImageRow(
        key=key, image=data, height=72, width=72, digest=image_digest(data), group=group_of(key),
        label=names.index(category(key)),
    )  # fmt: skip


def pretrained(work: Path, images: str, steps: int) -> str:
    """URI of a run of MAE."""
    config = training.PretrainConfig(
        images=images,
        output=str(work / "mae"),
        model=training.ModelConfig(**MODEL, drop_path=0.0),
        objective=training.ObjectiveConfig(kind="mae", **DECODER),
        masking=training.MaskingConfig(kind="random", num_masked=48),
        data=training.DataConfig(global_batch_size=128, **PIXELS),
        optim=training.OptimConfig(
            steps=steps, warmup_steps=steps // 10, lr=2e-3, beta2=0.95, clip_grad_norm=None
        ),
        scaling=training.ScalingConfig(num_workers=0),
        checkpoint=training.CheckpointConfig(every_steps=100),
        **QUIET,
    )
    return pretrain.run(config).run_uri


def untrained(work: Path, seed: int) -> str:
    """URI of the weights that such a run begins with."""
    network = MaeNetwork(**MODEL, **DECODER)
    network.init_weights(torch.Generator().manual_seed(seed))
    extra = {"pixel_mean": PIXELS["mean"], "pixel_std": PIXELS["std"]}
    save_weights(network.plain(), work / f"initial-{seed}", extra=extra)
    return str(work / f"initial-{seed}")


def tuned(
    work: Path, name: str, run: str, tables: dict[str, str], seed: int, epochs: int
) -> TestScore:
    """The test of a fine-tuning run; layers learn alike where there is nothing to keep."""
    config = tuning.FinetuneConfig(
        run=run,
        images=tables["labelled"],
        test=tables["test"],
        output=str(work / f"{name}-{seed}"),
        seed=seed,
        policy=dataclasses.replace(tuning.SUPERVISED, min_area=0.3),
        data=tuning.DataConfig(global_batch_size=64, num_shards=8, window=128),
        optim=tuning.OptimConfig(
            epochs=epochs, warmup_epochs=epochs / 6, lr=2e-3, min_lr=1e-5, clip_grad_norm=None,
            layer_decay=0.75 if name == "pretrained" else 1.0,
        ),
        testing=tuning.TestingConfig(every_epochs=1000, crop_fraction=1.0),
        scaling=training.ScalingConfig(num_workers=0),
        **QUIET,
    )  # fmt: skip
    score = finetune.run(config).test
    print(f"{name}, seed {seed}: {score.describe()}", flush=True)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pretrain_steps", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = write_tables(options.work)
    mae = pretrained(options.work, tables["unlabelled"], options.pretrain_steps)
    scores = {
        name: [
            tuned(options.work, name, begin(seed), tables, seed, options.epochs) for seed in SEEDS
        ]
        for name, begin in (
            ("pretrained", lambda _: mae),
            ("random", lambda seed: untrained(options.work, seed)),
        )
    }
    print("\n| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |")
    print("| --- |" + " --- |" * (len(SEEDS) + 1))
    for name, found in scores.items():
        cells = [f"{100 * s.accuracy:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in found]
        mean = statistics.mean(s.accuracy for s in found)
        print(f"| {name} | " + " | ".join(cells) + f" | {100 * mean:.1f} |")
    print(f"\n{time.process_time():.0f} CPU-seconds")


if __name__ == "__main__":
    main()
