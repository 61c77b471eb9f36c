"""From a configuration to the objective that a run trains."""

import torch
from torch import nn

from beit.mae import Mae, MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM
from beit.objectives import Beit, BeitV2, Objective
from beit.positions import resize_positions
from beit.vit import EncoderOptions
from beit.warm_start import taken_over
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError
from pipelines.tables.weights_store import open_whole


def build_objective(config: PretrainConfig, vocab_size: int | None) -> Objective:
    """The objective, on the CPU, with initial weights that follow from the seed alone.

    `vocab_size` is that of the token tables, None without them.
    """
    m, how = config.model, config.objective
    options = EncoderOptions(
        image_size=m.image_size,
        patch_size=m.patch_size,
        dim=m.dim,
        depth=m.depth,
        num_heads=m.num_heads,
        mlp_ratio=m.mlp_ratio,
        absolute_positions=m.absolute_positions,
        relative_positions=m.relative_positions,
        layer_scale_init=m.layer_scale_init,
        drop_path=m.drop_path,
    )
    objective: Objective
    network: BeitMIM | MaeNetwork
    if how.kind == "mae":
        network = MaeNetwork(
            **options,
            decoder_dim=how.decoder_dim,
            decoder_depth=how.decoder_depth,
            decoder_heads=how.decoder_heads,
        )
        objective = Mae(network, normalise=how.normalise_pixels)
    elif how.kind == "beitv2":
        network = BeitV2MIM(
            **options,
            vocab_size=_known(vocab_size),
            early_layer=how.early_layer,
            head_layers=how.head_layers,
        )
        objective = BeitV2(network)
    else:
        network = BeitMIM(**options, vocab_size=_known(vocab_size))
        objective = Beit(network)
    network.init_weights(torch.Generator().manual_seed(config.seed))
    network.activation_checkpointing = config.scaling.activation_checkpointing
    return objective


def _known(vocab_size: int | None) -> int:
    assert vocab_size is not None, "open_tables refuses a run that predicts tokens and has none"
    return vocab_size


def warm_start(config: PretrainConfig, network: nn.Module) -> str:
    """Gives `network` the weights at `config.init`, positions resized: their fingerprint.

    A network on torch's meta device is only compared with them.

    Raises:
        InputError: there are none, or their encoder is another one.
    """
    stored = open_whole(config.init, field="init")
    weights, side = stored.network, config.model.image_size
    if weights.image_size != (side, side):
        plain = weights.plain() if isinstance(weights, BeitV2MIM | MaeNetwork) else weights
        weights = resize_positions(plain, side)
    try:
        taken = taken_over(network, weights, source=stored.uri)
    except ValueError as error:
        raise InputError(
            f"init = {config.init}: {error}; give model.* the sizes of these weights"
        ) from error
    if next(network.parameters()).device.type != "meta":
        network.load_state_dict(taken, strict=False)
    return stored.fingerprint


def flops_per_image(config: PretrainConfig, vocab_size: int | None) -> float:
    """Floating-point operations of one image's forward and backward pass."""
    with torch.device("meta"):
        objective = build_objective(config, vocab_size)
    return objective.flops_per_image(config.masking.num_masked)
