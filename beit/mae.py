"""Masked autoencoding: the encoder sees visible patches only, a narrow decoder paints the others.

Provenance: arXiv 2111.06377; facebookresearch/mae, `models_mae.py`. The `state_dict` has its names,
but for the bias of queries, keys and values: that of the keys shifts all logits of a query alike,
so it changes nothing, and the encoder's blocks have none (`q_bias`, `v_bias`). What differs else:
the decoder's last block is evaluated for masked patches only, which changes no output.
"""

import math
from collections.abc import Mapping
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from beit import flops
from beit.mim import BeitMIM, masked_rows
from beit.objectives import Objective, Outcome
from beit.vit import BeitEncoder, Block, EncoderOptions, run


def sine_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions float32 (1, 1+H*W, dim), zeros for cls: half the width for each axis.

    The column comes first, each half as sines, then cosines, of falling frequencies. ValueError
    unless dim divides by 4.
    """
    if dim % 4:
        raise ValueError(f"dim {dim}: sine-cosine positions need a multiple of 4")
    H, W = grid_size
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    positions = torch.zeros(1, 1 + H * W, dim, dtype=torch.float64)
    axes = (torch.arange(H * W) % W, torch.arange(H * W) // W)
    angles = [axis[:, None] * frequencies for axis in axes]
    positions[0, 1:] = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return positions.float()


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) to (B, N, P*P*3), patches row-major, inside each row, column, channel."""
    B, _, height, width = pixels.shape
    x = pixels.view(
        B, 3, height // patch_size, patch_size, width // patch_size, patch_size
    )  # (B, 3, rows, P, columns, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, 3 * patch_size**2)


def from_patches(patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`."""
    B, side = len(patches), math.isqrt(patches.shape[-1] // 3)
    x = patches.view(B, *grid_size, side, side, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, 3, grid_size[0] * side, grid_size[1] * side)


class MaeNetwork(BeitEncoder):
    """The pretraining network: a plain encoder with fixed positions, and its decoder.

    Others than the decoder's: see `BeitEncoder`; `absolute_positions` must be True and
    `relative_positions` "none". Masks must hide equally many patches of each image.
    """

    #: The official code spares one-dimensional parameters only; positions are not trained.
    no_weight_decay = frozenset()

    def __init__(
        self,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        if self.pos_embed is None or self.relative_positions != "none":
            raise ValueError(
                "MAE sees visible patches only, by fixed absolute positions: use "
                "absolute_positions=True and relative_positions='none'"
            )
        if decoder_dim % decoder_heads:
            raise ValueError(
                f"decoder_dim {decoder_dim} is not divisible by decoder_heads {decoder_heads}"
            )
        self.decoder_dim, self.decoder_heads = decoder_dim, decoder_heads
        self.norm = nn.LayerNorm(self.dim, eps=self.norm_eps)
        self.decoder_embed = nn.Linear(self.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_dim))
        self.pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)
        self.decoder_blocks = nn.ModuleList(
            Block(
                dim=decoder_dim,
                num_heads=decoder_heads,
                hidden_dim=4 * decoder_dim,
                layer_scale_init=None,
                drop_path=0.0,
                norm_eps=self.norm_eps,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=self.norm_eps)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * self.patch_size**2)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the official code does: Xavier, tokens N(0, 0.02)."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1)
                    module.bias.fill_(0)
                elif isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                    if module.bias is not None:
                        module.bias.fill_(0)
                elif isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    cast(Tensor, module.bias).uniform_(-bound, bound, generator=generator)
                elif isinstance(module, Block):
                    module.attn.q_bias.fill_(0)
                    module.attn.v_bias.fill_(0)
                    for gamma in (module.gamma_1, module.gamma_2):
                        if gamma is not None:
                            gamma.fill_(cast(float, self.layer_scale_init))
            for token in (self.cls_token, self.mask_token):
                token.normal_(std=0.02, generator=generator)
            cast(Tensor, self.pos_embed).copy_(sine_positions(self.grid_size, self.dim))
            self.decoder_pos_embed.copy_(sine_positions(self.grid_size, self.decoder_dim))

    def config(self) -> dict[str, Any]:
        """JSON values for which `MaeNetwork(**config)` is this architecture."""
        decoder = {
            "decoder_dim": self.decoder_dim,
            "decoder_depth": len(self.decoder_blocks),
            "decoder_heads": self.decoder_heads,
        }
        return {**super().config(), **decoder}

    def plain(self, weights: Mapping[str, Tensor] | None = None) -> BeitMIM:
        """The encoder of these weights (default: its own), without a head; its mask token is zero,
        for it has never seen one."""
        options = {k: v for k, v in self.config().items() if not k.startswith("decoder_")}
        plain = BeitMIM(**options, vocab_size=0)
        state = self.state_dict() if weights is None else weights
        encoder = {n: v for n, v in state.items() if not n.startswith("decoder_")}
        plain.load_state_dict({**encoder, "mask_token": torch.zeros(1, 1, plain.dim)})
        return plain

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        *,
        num_masked: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """What masked patches look like: (masked in the batch, P*P*3), as `to_patches` orders.

        pixels (B, 3, H, W) normalised; mask (B, N) bool, True = masked, equally many in each
        image: ValueError if not, where the mask is on the CPU. num_masked and noise as those of
        `BeitMIM.forward`.
        """
        B, N = mask.shape
        rows = masked_rows(mask, num_masked)
        num_masked = len(rows)
        if not torch.compiler.is_compiling() and mask.device.type == "cpu":
            counts = mask.sum(dim=1)
            if (counts != counts[0]).any():
                raise ValueError(
                    f"{int(counts.min())} to {int(counts.max())} patches are masked in an image; "
                    "MAE needs as many in each: use random or exact masks"
                )
        # cls and visible patches, image by image.
        seen = torch.cat((torch.ones_like(mask[:, :1]), ~mask), dim=1).flatten()
        kept = torch.nonzero_static(seen, size=B * (1 + N) - num_masked).squeeze(1)

        x = self.embed(pixels, None, None)
        x = x.flatten(0, 1).index_select(0, kept).view(B, -1, self.dim)  # (B, 1+visible, dim)
        y = self.decoder_embed(self.norm(self.run_blocks(x, noise=noise)))

        canvas = self.mask_token.to(y.dtype).expand(B, 1 + N, -1).flatten(0, 1)
        y = canvas.index_copy(0, kept, y.flatten(0, 1)).view(B, 1 + N, -1) + self.decoder_pos_embed
        y = run(list(self.decoder_blocks), y, last_rows=rows, recompute=self.recomputes)
        painted: Tensor = self.decoder_pred(self.decoder_norm(y))
        return painted

    def features(self, pixels: Tensor, *, layer: int) -> Tensor:
        """Tokens (B, 1+N, dim) of whole images after block `layer` (from 1), cls first."""
        return self.run_blocks(self.embed(pixels, None, None), num_blocks=layer)


class PixelLoss(nn.Module):
    """Squared error of painted (M, P*P*3) patches `index` of pixels, mean over a patch, summed.

    A module of its own, since it is compiled.
    """

    def __init__(self, patch_size: int, *, normalise: bool) -> None:
        super().__init__()
        self.patch_size, self.normalise = patch_size, normalise

    def forward(self, painted: Tensor, pixels: Tensor, index: Tensor) -> Tensor:
        wanted = to_patches(pixels, self.patch_size).flatten(0, 1).index_select(0, index)
        if self.normalise:
            mean, deviation = _statistics(wanted)
            wanted = (wanted - mean) / deviation
        return (painted.float() - wanted).square().mean(dim=-1).sum()


class Mae(Objective):
    """MAE: squared error of the pixels of masked patches, mean over a patch; needs no tokens.

    With `normalise` each patch's pixels are first brought to mean 0 and deviation 1.
    """

    metrics = ("loss",)
    network: MaeNetwork

    def __init__(self, network: MaeNetwork, *, normalise: bool = True) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.pixel_loss = PixelLoss(network.patch_size, normalise=normalise)

    @property
    def num_branches(self) -> int:
        return self.network.depth

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        targets: Tensor | None,  # noqa: ARG002 - the pixels are the target
        *,
        num_masked: int,
        noise: Tensor | None,
    ) -> Outcome:
        painted = self.network(pixels, mask, num_masked=num_masked, noise=noise)
        index = torch.nonzero_static(mask.flatten(), size=num_masked).squeeze(1)
        return Outcome(self.pixel_loss(painted, pixels, index)[None], None)

    def predict(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """The images with masked patches painted, at their true mean and deviation if these were
        taken out: float32 (B, 3, H, W), normalised as `pixels`."""
        patches = to_patches(pixels, self.network.patch_size)
        painted = self.network(pixels, mask).float()
        if self.normalise:
            mean, deviation = _statistics(patches[mask])
            painted = painted * deviation + mean
        patches = patches.masked_scatter(mask[..., None], painted)
        return from_patches(patches, self.network.grid_size)

    def export(self, weights: Mapping[str, Tensor]) -> BeitMIM:
        """The encoder, without a head; its mask token is zero, for it has never seen one."""
        return self.network.plain(weights)

    def flops_per_image(self, num_masked: float) -> float:
        n, decoder_depth = self.network, len(self.network.decoder_blocks)
        tokens, visible = n.num_patches + 1, n.num_patches + 1 - num_masked
        embedding = flops.patch_embedding(n.num_patches, n.patch_size, n.dim)
        encoder = n.depth * flops.block(visible, n.dim, n.mlp_ratio)
        decoder = flops.linear(visible, n.dim, n.decoder_dim)
        decoder += (decoder_depth - 1) * flops.block(tokens, n.decoder_dim, 4)
        decoder += flops.block(tokens, n.decoder_dim, 4, rows=num_masked)
        decoder += flops.linear(num_masked, n.decoder_dim, 3 * n.patch_size**2)
        return flops.with_backward(embedding + encoder + decoder, embedding)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation of each patch (..., 1), the latter never zero."""
    mean = patches.mean(dim=-1, keepdim=True)
    squares = (patches - mean).square().sum(dim=-1, keepdim=True)
    return mean, (squares / (patches.shape[-1] - 1) + 1e-6).sqrt()
