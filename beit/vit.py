"""The BEiT encoder: a pre-norm vision transformer in the two forms that share the name.

The paper's main tables train the *plain* form (learned absolute positions, no layer scale); the
released code trains one relative position bias shared by all blocks, with layer scale, and
fine-tunes with a bias per block. Both are here, with the parameter names of the official code.

Provenance: arXiv 2106.08254; microsoft/unilm at 768a3c8, `beit/modeling_pretrain.py` and
`beit/modeling_finetune.py`. What differs: attention goes through
`scaled_dot_product_attention`; the last block can be evaluated for chosen rows only; index
buffers are not saved; drop-path takes its randomness as an argument.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit import counters, cpu_attention
from beit.position_bias import RelativePositionBias, add_bias_table, look_up_bias

RelativePositions = Literal["none", "shared", "per_block"]


def image_hw(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """`image_size` as (height, width) in pixels; ValueError unless both divide by the patch."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or height < patch_size or width < patch_size:
        raise ValueError(f"image_size {image_size!r} holds no patch of patch_size {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image_size {image_size!r} is not divisible by patch_size {patch_size}; "
            f"use a multiple of {patch_size} for height and width"
        )
    return height, width


def drop_path_noise(*, seed: int, step: int, num_samples: int, num_branches: int) -> Tensor:
    """Uniform draws in [0, 1) that decide drop-path: float32 (num_samples, num_branches, 2).

    On the CPU; `num_branches` is the number of blocks. A pure function of its arguments (Philox).
    Draw it for the *global* batch of a step and hand each worker and micro-batch its rows: the
    same samples then keep the same branches however many workers there are, and a resumed run
    repeats an uninterrupted one.
    """
    generator = counters.step_generator(seed % 2**64, step)
    return torch.from_numpy(generator.random((num_samples, num_branches, 2), dtype=np.float32))


class PatchEmbed(nn.Module):
    """Pixels (B, 3, H, W) to patch vectors (B, N, dim), row-major in the grid."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels)
        return out.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention whose key projection has no bias."""

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, own_bias_grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        if own_bias_grid is None:
            self.register_parameter("relative_position_bias_table", None)
        else:
            add_bias_table(self, own_bias_grid, num_heads)

    def forward(self, x: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        """(B, T, dim) -> (B, T, dim), or (len(rows), dim) for flat indices into B*T."""
        B, T, D = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        if self.relative_position_bias_table is not None:
            own = look_up_bias(self.relative_position_bias_table, self.relative_position_index)
            bias = own if bias is None else bias + own
        if cpu_attention.wanted(qkv, bias):
            out = cpu_attention.attention(qkv, bias, self.num_heads)
        else:
            # (B, T, 3*D) -> 3 x (B, heads, T, D/heads)
            q, k, v = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            # (B, heads, T, D/heads) -> (B, T, heads, D/heads)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        out = out.reshape(B, T, D) if rows is None else out.reshape(B * T, D).index_select(0, rows)
        projected: Tensor = self.proj(out)
        return projected


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class BlockNorm(nn.LayerNorm):
    """A layer norm whose weights may be gathered in a smaller type than that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        wider = torch.promote_types(self.weight.dtype, x.dtype)
        weight, bias = self.weight.to(wider), self.bias.to(wider)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block with optional layer scale and drop-path."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        layer_scale_init: float | None,
        drop_path: float,
        norm_eps: float,
        own_bias_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = BlockNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, own_bias_grid)
        self.norm2 = BlockNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim)
        self.drop_path = drop_path
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale_init is not None:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale_init))

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        noise: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """One block.

        x (B, T, dim); bias broadcastable to (B, heads, T, T); noise (B, 2) uniform draws for
        drop-path, None to keep every branch; rows, flat indices into B*T, limits the output to
        those rows, (len(rows), dim): they still attend to all T tokens, so it is exact.
        """
        T = x.shape[1]
        y = self.attn(self.norm1(x), bias, rows)
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        keep: Tensor | None = None
        if noise is not None and self.drop_path > 0:
            survival = 1 - self.drop_path
            keep = torch.floor(noise + survival) / survival
            # (B, 2) -> (B, 2, 1), or one pair per row
            keep = keep[:, :, None] if rows is None else keep.index_select(0, rows // T)
        x = _residual(x, y, self.gamma_1, None if keep is None else keep[:, 0, None])
        y = self.mlp(self.norm2(x))
        return _residual(x, y, self.gamma_2, None if keep is None else keep[:, 1, None])


def _residual(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """x + keep * gamma * y; the two small factors are multiplied first, so y is passed once."""
    if gamma is not None and keep is not None:
        return torch.addcmul(x, keep * gamma, y)
    factor = gamma if gamma is not None else keep
    return x + y if factor is None else torch.addcmul(x, factor, y)


class EncoderOptions(TypedDict):
    """Keyword arguments of `BeitEncoder`, for the networks that add a head to it."""

    image_size: int | tuple[int, int]
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: NotRequired[float]
    absolute_positions: bool
    relative_positions: RelativePositions
    layer_scale_init: float | None
    drop_path: NotRequired[float]
    norm_eps: NotRequired[float]


class BeitEncoder(nn.Module):
    """Patch embedding, positions, blocks: what the pretraining and fine-tuning nets share.

    `image_size` is pixels, an int or (height, width). `layer_scale_init` None leaves layer
    scale out. `drop_path` is the rate of the last block; rates rise linearly from 0.
    Set `activation_checkpointing = True` on an instance to recompute blocks in the backward
    pass: outputs and gradients stay equal, activation memory falls to one block's.
    """

    #: 2-D and 3-D parameters that weight decay spares (1-D ones always are).
    no_weight_decay = frozenset({"pos_embed", "cls_token"})

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4,
        absolute_positions: bool,
        relative_positions: RelativePositions,
        layer_scale_init: float | None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if relative_positions not in ("none", "shared", "per_block"):
            raise ValueError(
                f"relative_positions {relative_positions!r}: use none, shared or per_block"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} is outside [0, 1)")
        self.image_size = image_hw(image_size, patch_size)
        self.patch_size = patch_size
        self.grid_size = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.dim, self.depth, self.num_heads = dim, depth, num_heads
        self.mlp_ratio, self.norm_eps, self.drop_path = mlp_ratio, norm_eps, drop_path
        self.relative_positions = relative_positions
        # The official code builds layer scale only for values above zero.
        self.layer_scale_init = layer_scale_init or None
        self.activation_checkpointing = False

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed: nn.Parameter | None = None
        if absolute_positions:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, dim))
        self.rel_pos_bias: RelativePositionBias | None = None
        if relative_positions == "shared":
            self.rel_pos_bias = RelativePositionBias(self.grid_size, num_heads)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=num_heads,
                hidden_dim=int(dim * mlp_ratio),
                layer_scale_init=self.layer_scale_init,
                drop_path=drop_path * i / max(depth - 1, 1),
                norm_eps=norm_eps,
                own_bias_grid=self.grid_size if relative_positions == "per_block" else None,
            )
            for i in range(depth)
        )

    def config(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this network, as plain JSON values."""
        return {
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "dim": self.dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "absolute_positions": self.pos_embed is not None,
            "relative_positions": self.relative_positions,
            "layer_scale_init": self.layer_scale_init,
            "drop_path": self.drop_path,
            "norm_eps": self.norm_eps,
        }

    def embed(self, pixels: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
        """Tokens (B, 1+N, dim) that enter the first block; ValueError for another image size."""
        if tuple(pixels.shape[-2:]) != self.image_size:
            raise ValueError(
                f"pixels are {tuple(pixels.shape[-2:])}, this model is built for "
                f"{self.image_size}; resize the images, or the weights with "
                "beit.positions.resize_positions"
            )
        x: Tensor = self.patch_embed(pixels)
        if mask is not None:
            if tuple(mask.shape) != tuple(x.shape[:2]):
                raise ValueError(f"mask is {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")
            if mask_token is None:
                raise ValueError("this model has no mask_token, so it takes no mask")
            # Before positions are added: a masked slot still knows where it is.
            x = torch.where(mask[:, :, None], mask_token, x)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def run_blocks(
        self,
        x: Tensor,
        *,
        num_blocks: int | None = None,
        noise: Tensor | None = None,
        last_rows: Tensor | None = None,
    ) -> Tensor:
        """The first `num_blocks` blocks (default all), before the final norm.

        noise (B, depth, 2) are drop-path draws, see `branch_noise`. last_rows (flat indices into
        B*(1+N)) limits the output of the last of them to those rows.
        """
        return run(
            list(self.blocks)[:num_blocks],
            x,
            bias=None if self.rel_pos_bias is None else self.rel_pos_bias(),
            noise=self.branch_noise(noise, x, self.depth),
            last_rows=last_rows,
            recompute=self.recomputes,
        )

    def pooled_blocks(
        self, pixels: Tensor, layers: Sequence[int], pool: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """What `pool` makes of the tokens (B, 1+N, dim) after each of `layers` (from 1), cls first.

        Of whole, normalised images, in one pass; tokens are not kept.
        """
        x = self.embed(pixels, None, None)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        found = {}
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x, bias)
            if number in layers:
                found[number] = pool(x)
        return [found[layer] for layer in layers]

    def branch_noise(self, noise: Tensor | None, x: Tensor, num_branches: int) -> Tensor | None:
        """Drop-path draws (B, num_branches, 2) for B = len(x), or None where none are needed.

        In training mode with `drop_path` > 0 and no noise given they come from torch's default
        generator, once per call. ValueError for noise of another shape.
        """
        if not self.training or self.drop_path == 0:
            return None
        shape = (x.shape[0], num_branches, 2)
        if noise is None:
            return torch.rand(shape, device=x.device)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, not {shape}")
        return noise

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed in the backward pass of what runs now."""
        return self.activation_checkpointing and self.training and torch.is_grad_enabled()


def run(
    blocks: Sequence[nn.Module],
    x: Tensor,
    *,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    first_branch: int = 0,
    last_rows: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Blocks one after the other on x (B, T, dim); block i takes noise[:, first_branch + i].

    last_rows (flat indices into B*T) limits the output of the last one, (len(last_rows), dim).
    """
    for i, block in enumerate(blocks):
        draws = None if noise is None else noise[:, first_branch + i]
        rows = last_rows if i == len(blocks) - 1 else None
        if recompute:
            # Blocks draw nothing themselves, so there is no generator state to preserve.
            x = checkpoint(
                block, x, bias, draws, rows, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = block(x, bias, draws, rows)
    return x
