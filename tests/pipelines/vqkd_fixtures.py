"""Teachers of a second, and VQ-KD trainings of another one."""

import torch

from beit.mim import BeitMIM
from beit.weights import save_weights
from pipelines.config.train_tokenizer import (
    DataConfig,
    GateConfig,
    ModelConfig,
    OptimConfig,
    VqkdConfig,
)
from tests.pipelines.test_train_tokenizer import settings

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]


def make_teacher(directory, *, seed=0, image_size=16, patch_size=4):
    """Weights as `pretrain` leaves them: of a random encoder, whose features are no constant."""
    torch.manual_seed(seed)
    model = BeitMIM(
        image_size=image_size, patch_size=patch_size, dim=24, depth=3, num_heads=2, vocab_size=8,
        absolute_positions=True, relative_positions="none", layer_scale_init=None,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    save_weights(model, directory, extra={"pixel_mean": MEAN, "pixel_std": STD})
    return str(directory)


def vqkd_settings(images, output, teacher, **changes):
    """Twelve steps; a code is given up after a few."""
    options = {
        "teacher": teacher,
        "layer": 2,
        "model": ModelConfig(
            kind="vqkd", image_size=16, patch_size=4, dim=32, depth=2, num_heads=2, vocab_size=32,
            code_dim=8,
        ),
        "vqkd": VqkdConfig(decay=0.8, restart_below=0.2),
        "data": DataConfig(global_batch_size=16, num_shards=4, window=8),
        "optim": OptimConfig(steps=12, lr=2e-3, warmup_steps=2, weight_decay=0.01),
        "gate": GateConfig(min_perplexity=2, min_codes=4, grace_steps=0, num_images=40),
    }  # fmt: skip
    return settings(images, output, **{**options, **changes})
