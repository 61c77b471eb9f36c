"""Masked image modelling with BEiT and BEiT v2: encoder, mask token, a head over visual tokens.

Provenance: arXiv 2106.08254 and 2208.06366; microsoft/unilm at 768a3c8,
`beit/modeling_pretrain.py` and `beit2/modeling_pretrain.py`. The `state_dict` has their names.
What differs: the last block and the head are evaluated only where there is something to predict,
which changes no output.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor, nn

from beit.initialisation import damp_, init_encoder_, torch_linear_
from beit.vit import BeitEncoder, Block, EncoderOptions, run

#: Width, depth, heads and layer-scale start of the named sizes (base and large: the paper's).
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "num_heads": 3, "layer_scale_init": 0.1},
    "small": {"dim": 384, "depth": 12, "num_heads": 6, "layer_scale_init": 0.1},
    "base": {"dim": 768, "depth": 12, "num_heads": 12, "layer_scale_init": 0.1},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16, "layer_scale_init": 1e-5},
}


def model_config(
    size: str,
    *,
    architecture: Literal["shared_bias", "plain"] = "shared_bias",
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    vocab_size: int = 8192,
    drop_path: float = 0.0,
) -> dict[str, Any]:
    """Keyword arguments of `BeitMIM` for a named size.

    "shared_bias" is the released code's network (one relative position bias for all blocks,
    layer scale); "plain" is that of the paper's main tables (absolute positions, neither).
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    if architecture not in ("shared_bias", "plain"):
        raise ValueError(f"architecture {architecture!r} is unknown; use shared_bias or plain")
    plain = architecture == "plain"
    return {
        **SIZES[size],
        **({"layer_scale_init": None} if plain else {}),
        "absolute_positions": plain,
        "relative_positions": "none" if plain else "shared",
        "image_size": image_size,
        "patch_size": patch_size,
        "vocab_size": vocab_size,
        "drop_path": drop_path,
    }


class BeitMIM(BeitEncoder):
    """The pretraining network.

    Built with fresh weights from torch's default generator; `init_weights(generator)` draws
    them again from a generator of the caller's. `vocab_size` 0 leaves the head out (a published
    encoder without one): forward then gives normalised states. Others: see `BeitEncoder`.
    """

    def __init__(self, *, vocab_size: int, **options: Unpack[EncoderOptions]) -> None:
        super().__init__(**options)
        self.vocab_size = vocab_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.norm = nn.LayerNorm(self.dim, eps=self.norm_eps)
        self.lm_head: nn.Module = nn.Linear(self.dim, vocab_size) if vocab_size else nn.Identity()
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the official code does (see `init_encoder_`)."""
        init_encoder_(self, generator)

    def config(self) -> dict[str, Any]:
        """JSON values for which `BeitMIM(**config)` is this architecture."""
        return {**super().config(), "vocab_size": self.vocab_size}

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        *,
        all_tokens: bool = False,
        num_masked: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Logits over visual tokens.

        pixels (B, 3, H, W) normalised; mask (B, N) bool, True = masked, counts may differ
        between images. Returns (masked in the batch, vocab_size) in row-major order of the
        mask, the order of `token_ids[mask]`; with all_tokens (B, N, vocab_size).

        num_masked is `mask.sum()` where the caller knows it: on CUDA it saves waiting for the
        device, and under torch.compile a graph break. noise (B, depth, 2): the draws for
        drop-path, see `beit.vit.drop_path_noise`.
        """
        x = self.embed(pixels, mask, self.mask_token)
        if all_tokens:
            out: Tensor = self.lm_head(self.norm(self.run_blocks(x, noise=noise)[:, 1:]))
            return out
        rows = masked_rows(mask, num_masked)
        masked: Tensor = self.lm_head(self.norm(self.run_blocks(x, noise=noise, last_rows=rows)))
        return masked

    def features(self, pixels: Tensor, *, layer: int | None = None) -> Tensor:
        """Tokens (B, 1+N, dim) of unmasked images, cls first.

        After block `layer` (from 1), not normalised; None is the last block and the final norm.
        """
        if layer is not None and not 1 <= layer <= self.depth:
            raise ValueError(f"layer {layer} is outside 1..{self.depth}; None is the final norm")
        x = self.run_blocks(self.embed(pixels, None, None), num_blocks=layer)
        return x if layer is not None else self.norm(x)


class BeitV2MIM(BeitMIM):
    """BEiT v2's pretraining network: the class token must carry what patches cannot say.

    Besides the last block, an aggregation head predicts the tokens: `head_layers` more blocks, of
    which the input is the last class token with the patch states after block `early_layer` (from
    1). Norm and `lm_head` are shared. The head blocks start as torch's layers do, their depth
    counted on from `early_layer`: the official code initialises all but them.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        early_layer: int,
        head_layers: int = 2,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self.early_layer = early_layer
        super().__init__(vocab_size=vocab_size, **options)
        if not 1 <= early_layer < self.depth or head_layers < 1:
            raise ValueError(
                f"early_layer {early_layer} must be in 1..{self.depth - 1} (depth {self.depth}), "
                f"and head_layers {head_layers} at least 1"
            )
        layers = range(early_layer, early_layer + head_layers)
        last = max(self.depth, layers.stop) - 1
        self.cls_pt_layers = nn.ModuleList(
            Block(
                dim=self.dim,
                num_heads=self.num_heads,
                hidden_dim=int(self.dim * self.mlp_ratio),
                layer_scale_init=self.layer_scale_init,
                drop_path=self.drop_path * layer / last,
                norm_eps=self.norm_eps,
                own_bias_grid=self.grid_size if self.relative_positions == "per_block" else None,
            )
            for layer in layers
        )
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the official code does."""
        super().init_weights(generator)
        head = cast("list[Block]", list(getattr(self, "cls_pt_layers", ())))
        for i, block in enumerate(head):
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    torch_linear_(module, generator)
            damp_(block, self.early_layer + i + 1, self.layer_scale_init)

    def config(self) -> dict[str, Any]:
        """JSON values for which `BeitV2MIM(**config)` is this architecture."""
        head_layers = len(self.cls_pt_layers)
        return {**super().config(), "early_layer": self.early_layer, "head_layers": head_layers}

    def plain(self, weights: Mapping[str, Tensor] | None = None) -> BeitMIM:
        """The network without its aggregation head, of these weights (default: its own)."""
        config = self.config()
        del config["early_layer"], config["head_layers"]
        plain = BeitMIM(**config)
        state = self.state_dict() if weights is None else weights
        plain.load_state_dict({n: v for n, v in state.items() if not n.startswith("cls_pt_")})
        return plain

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        *,
        all_tokens: bool = False,
        num_masked: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """As `BeitMIM.forward`, with one axis more: (2, ...), last block and aggregation head.

        noise (B, depth + head_layers, 2).
        """
        if all_tokens:
            num_masked = None
        x = self.embed(pixels, mask, self.mask_token)
        B, T, _ = x.shape
        noise = self.branch_noise(noise, x, self.depth + len(self.cls_pt_layers))
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        rows = masked_rows(torch.ones_like(mask) if all_tokens else mask, num_masked)
        cls = torch.arange(B, device=x.device) * T
        through = partial(run, bias=bias, noise=noise, recompute=self.recomputes)

        blocks, split = list(self.blocks), self.early_layer
        early = through(blocks[:split], x)
        # The last block is evaluated for class tokens and what is predicted only.
        late = through(blocks[split:], early, first_branch=split, last_rows=torch.cat((cls, rows)))
        joined = torch.cat((late[:B, None], early[:, 1:]), dim=1)
        head = list(self.cls_pt_layers)
        aggregated = through(head, joined, first_branch=self.depth, last_rows=rows)
        states = torch.stack((late[B:], aggregated))  # (2, predicted, dim)
        if all_tokens:
            states = states.view(2, *mask.shape, self.dim)
        logits: Tensor = self.lm_head(self.norm(states))
        return logits


def masked_rows(mask: Tensor, num_masked: int | None = None) -> Tensor:
    """Where masked patches lie in the flattened tokens (B*(1+N)): int64 (masked,), row-major.

    ValueError if num_masked is given, the mask is on the CPU and they disagree.
    """
    flat = mask.flatten()
    if num_masked is None:
        index = flat.nonzero().squeeze(1)
    else:
        if not torch.compiler.is_compiling() and flat.device.type == "cpu":
            counted = int(flat.sum())
            if counted != num_masked:
                raise ValueError(f"num_masked is {num_masked}, but the mask has {counted}")
        index = torch.nonzero_static(flat, size=num_masked).squeeze(1)
    # Each image has one cls token in front of its patches.
    return index + index // mask.shape[1] + 1
