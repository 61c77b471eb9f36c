"""Small real tables with labels, and runs of seconds on them."""

from pathlib import Path

import torch

from beit.mim import BeitMIM
from beit.weights import save_weights
from pipelines.config.common import HealthConfig
from pipelines.config.finetune import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    MixingConfig,
    ModelConfig,
    OptimConfig,
    TestingConfig,
)
from pipelines.config.pretrain import CheckpointConfig, ScalingConfig
from pipelines.config.tracking import TrackingConfig
from tests.pipelines.pretrain_fixtures import write_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 16,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}


def write_encoder(path: Path | str, *, silent: bool = False, **changes: object) -> str:
    """A weights folder of an untrained encoder; a silent one does not tell its pixels."""
    model = BeitMIM(**{**ENCODER, **changes})
    model.init_weights(torch.Generator().manual_seed(3))
    save_weights(model, path, extra={} if silent else {"pixel_mean": MEAN, "pixel_std": STD})
    return str(path)


def make_inputs(root: Path) -> dict[str, str]:
    """Weights, images to train on and to test on."""
    write_images(str(root / "images"), 96)
    write_images(str(root / "test"), 30, parts=1)
    return {
        "run": write_encoder(root / "encoder"),
        "images": str(root / "images"),
        "test": str(root / "test"),
    }


def small_finetune(inputs: dict[str, str], output: Path | str, **sections) -> FinetuneConfig:
    """A run of seconds; `sections` override fields: optim={"steps": 5}, seed=1, ..."""
    plain = {k: v for k, v in sections.items() if not isinstance(v, dict)}

    def build(cls: type, name: str, **defaults: object) -> object:
        return cls(**{**defaults, **sections.get(name, {})})

    return FinetuneConfig(
        **{**inputs, "output": str(output), "log_every": 4, **plain},
        model=build(ModelConfig, "model"),
        augment=build(AugmentConfig, "augment"),
        mixing=build(MixingConfig, "mixing"),
        data=build(DataConfig, "data", global_batch_size=16, num_shards=4, window=8),
        optim=build(OptimConfig, "optim", steps=12, warmup_steps=2, lr=3e-3, clip_grad_norm=None),
        testing=build(TestingConfig, "testing"),
        scaling=build(ScalingConfig, "scaling", num_workers=0, peak_tflops=0.05),
        checkpoint=build(CheckpointConfig, "checkpoint", every_steps=4),
        health=build(HealthConfig, "health", data_starvation="off"),
        tracking=build(TrackingConfig, "tracking", enabled=False),
    )
