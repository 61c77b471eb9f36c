"""From a configuration to the objective that a run trains."""

import torch

from beit.mim import BeitMIM
from beit.objectives import Beit, Objective
from pipelines.config.pretrain import PretrainConfig


def build_objective(config: PretrainConfig, vocab_size: int | None) -> Objective:
    """The objective, on the CPU, with initial weights that follow from the seed alone.

    `vocab_size` is that of the token tables, None without them.
    """
    m = config.model
    assert vocab_size is not None
    network = BeitMIM(
        image_size=m.image_size,
        patch_size=m.patch_size,
        dim=m.dim,
        depth=m.depth,
        num_heads=m.num_heads,
        vocab_size=vocab_size,
        mlp_ratio=m.mlp_ratio,
        absolute_positions=m.absolute_positions,
        relative_positions=m.relative_positions,
        layer_scale_init=m.layer_scale_init,
        drop_path=m.drop_path,
    )
    network.init_weights(torch.Generator().manual_seed(config.seed))
    network.activation_checkpointing = config.scaling.activation_checkpointing
    return Beit(network)


def flops_per_image(config: PretrainConfig, vocab_size: int | None) -> float:
    """Floating-point operations of one image's forward and backward pass."""
    with torch.device("meta"):
        objective = build_objective(config, vocab_size)
    return objective.flops_per_image(config.masking.num_masked)
