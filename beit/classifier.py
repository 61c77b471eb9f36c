"""The fine-tuning network: encoder, mean of the patch tokens, norm, linear head.

Provenance: microsoft/unilm at 768a3c8, `beit/modeling_finetune.py`; the `state_dict` has that
file's names. Pretraining's `mask_token`, `norm` and `lm_head` have no part in it.
"""

from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from beit.initialisation import init_encoder_
from beit.mim import BeitMIM
from beit.vit import BeitEncoder, Block, EncoderOptions

#: The official start of the head: so small that fine-tuning begins at uniform predictions.
HEAD_INIT_SCALE = 0.001


class BeitClassifier(BeitEncoder):
    """Images to class logits. `num_classes` 0 leaves the head out: forward gives pooled features.

    Fresh weights come from torch's default generator, `init_weights` draws them again.
    """

    def __init__(self, *, num_classes: int, **options: Unpack[EncoderOptions]) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(self.dim, eps=self.norm_eps)
        self.head: nn.Module = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, the head scaled by HEAD_INIT_SCALE."""
        init_encoder_(self, generator)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(HEAD_INIT_SCALE)

    def config(self) -> dict[str, Any]:
        """JSON values for which `BeitClassifier(**config)` is this architecture."""
        return {**super().config(), "num_classes": self.num_classes}

    def forward(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Class logits (B, num_classes) of normalised pixels (B, 3, H, W)."""
        x = self.run_blocks(self.embed(pixels, None, None), noise=noise)
        logits: Tensor = self.head(self.fc_norm(x[:, 1:].mean(dim=1)))
        return logits


def classifier_from_pretraining(
    pretrained: BeitMIM,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    generator: torch.Generator | None = None,
) -> BeitClassifier:
    """A network to fine-tune: the encoder of `pretrained`, a fresh norm and head.

    A shared bias table is copied into every block and trains separately there, as in the
    official code. The encoder's tensors are copies.
    """
    config = {**pretrained.config(), "drop_path": drop_path}
    del config["vocab_size"]
    if config["relative_positions"] == "shared":
        config["relative_positions"] = "per_block"
    model = BeitClassifier(**config, num_classes=num_classes)
    model.init_weights(generator)
    fresh = model.state_dict()
    state = {name: value for name, value in fresh.items() if name.startswith(("fc_norm.", "head."))}
    state |= {
        name: value
        for name, value in per_block_tables(pretrained).items()
        if not name.startswith(("mask_token", "norm.", "lm_head."))
    }
    model.load_state_dict(state, strict=True)
    return model


def per_block_tables(model: BeitEncoder) -> dict[str, Tensor]:
    """The state of `model`, its shared bias table (if any) given to every block."""
    state = dict(model.state_dict())
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}.attn.relative_position_bias_table"
            own = cast(Block, block).attn.relative_position_bias_table
            state[name] = shared.clone() if own is None else shared + own.detach()
    return state
