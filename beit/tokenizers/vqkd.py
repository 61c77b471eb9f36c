"""BEiT v2's tokenizer (VQ-KD): patch states of a vision transformer, matched with a codebook.

Encoder, codes, and the decoder that exists in training only: it predicts a teacher's features from
the codes, so that a token says what a patch means to the teacher and not how it looks.

Provenance: arXiv 2208.06366; microsoft/unilm at 768a3c8, `beit2/modeling_vqkd.py` and
`beit2/norm_ema_quantizer.py`, with their initialisation. The encoder's parameters have their names.
What differs: distances are taken in float32 always, upstream's under autocast in float16; codes
that nothing is matched with any more can start again; the codebook is a buffer that the training
step moves, `forward` has no side effect.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.base import ImageTokenizer
from beit.views import Interpolation
from beit.vit import BeitEncoder, Block, run

NORM_EPS = 1e-6
HEAD_DIM = 64


class VqkdTokenizer(ImageTokenizer):
    """A token is the code nearest to its patch's state on the unit sphere.

    float16 rounds the transformer (upstream computes it so under autocast), never what stands
    between it and the tokens: norm, task layer and distances are float32.
    """

    architecture: ClassVar[str] = "vqkd"
    interpolation: ClassVar[Interpolation] = "bicubic"
    pixel_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    codebook: Tensor

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        vocab_size: int = 8192,
        code_dim: int = 32,
    ) -> None:
        super().__init__(image_size=image_size, stride=patch_size, vocab_size=vocab_size)
        self.encoder = BeitEncoder(
            image_size=image_size,
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            absolute_positions=True,
            relative_positions="none",
            layer_scale_init=None,
            norm_eps=NORM_EPS,
        )
        self.fc_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.task_layer = task_layer(dim, code_dim)
        # Training starts it at k-means centres of the first batch's states.
        self.register_buffer("codebook", F.normalize(torch.randn(vocab_size, code_dim), dim=1))
        initialise_(self)

    def model_config(self) -> dict[str, Any]:
        vocab_size, code_dim = self.codebook.shape
        return {
            "image_size": self.image_size,
            "patch_size": self.stride,
            "dim": self.encoder.dim,
            "depth": self.encoder.depth,
            "num_heads": self.encoder.num_heads,
            "vocab_size": vocab_size,
            "code_dim": code_dim,
        }

    def round_weights(self) -> None:
        self.encoder.half()

    def states(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> unit vectors float32 (B, N, code_dim)."""
        self.check_images(images)
        pixels = images.to(torch.float32) / 127.5 - 1
        pixels = pixels.to(self.encoder.patch_embed.proj.weight.dtype)
        x = self.encoder.run_blocks(self.encoder.embed(pixels, None, None))[:, 1:]
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.task_layer(self.fc_norm(x.float())), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """Minus half the squared distances, up to the half that all share: cosines of codes."""
        likeness = self.likeness(self.states(images))
        return likeness.transpose(1, 2).reshape(-1, self.vocab_size, *self.grid_size)

    def likeness(self, states: Tensor) -> Tensor:
        """states (..., code_dim) -> (..., V); the largest is the nearest code."""
        with torch.autocast(states.device.type, enabled=False):
            return states @ self.codebook.T - self.codebook.square().sum(1) / 2


class FeatureDecoder(nn.Module):
    """Codes (B, N, code_dim) -> a teacher's features (B, N, feature_dim); in training only."""

    def __init__(
        self,
        *,
        num_patches: int,
        code_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        feature_dim: int,
    ) -> None:
        super().__init__()
        # Upstream's patch embedding of patches of one "pixel" with code_dim channels.
        self.embed = nn.Linear(code_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=num_heads,
                hidden_dim=4 * dim,
                layer_scale_init=None,
                drop_path=0.0,
                norm_eps=NORM_EPS,
            )
            for _ in range(depth)
        )
        self.fc_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.task_layer = task_layer(dim, feature_dim)
        initialise_(self)

    def forward(self, codes: Tensor) -> Tensor:
        x: Tensor = self.embed(codes)
        x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        x = run(list(self.blocks), x + self.pos_embed)[:, 1:]
        features: Tensor = self.task_layer(self.fc_norm(x))
        return features


def task_layer(dim: int, out_dim: int) -> nn.Sequential:
    """From states to what they are compared with."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim))


def num_heads_of(dim: int) -> int:
    """One attention head for every 64 of the width, as in every published network."""
    return max(1, dim // HEAD_DIM)


@torch.no_grad()
def initialise_(model: nn.Module) -> None:
    """Upstream's start, by torch's default generator: normal weights and tokens of deviation 0.02.

    Biases are zero, but for the patch embedding's, which keeps torch's own start, and the output
    matrices of block l (from 1) are divided by sqrt(2 l).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "embed":
            module.weight.normal_(std=0.02)
            if module.bias is not None:
                module.bias.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "pos_embed")):
            parameter.normal_(std=0.02)
    for name, module in model.named_modules():
        if isinstance(module, Block):
            layer = 1 + int(name.rpartition(".")[2])
            module.attn.proj.weight.div_(math.sqrt(2 * layer))
            module.mlp.fc2.weight.div_(math.sqrt(2 * layer))


# The codebook in training


def moved_codebook(codebook: Tensor, sums: Tensor, counts: Tensor, decay: float) -> Tensor:
    """The codebook (V, D) after a step: codes turn towards the mean of the states matched to them.

    sums (V, D) and counts (V,) are of the whole batch. Codes without a state stay.
    """
    turned = F.normalize(decay * codebook + (1 - decay) * F.normalize(sums, dim=1), dim=1)
    return torch.where(counts[:, None] > 0, turned, codebook)


def restarted(
    codebook: Tensor, usage: Tensor, candidates: Tensor, *, least: float, fresh: float
) -> tuple[Tensor, Tensor]:
    """Codebook and usage with codes of a usage below `least` put at candidates (R, D).

    At most R of them, the first ones; each gets one candidate and the usage `fresh`. Nothing waits
    for the device.
    """
    dead = usage < least
    place = dead.cumsum(0) - 1
    moves = dead & (place < len(candidates))
    taken = candidates[place.clamp(0, len(candidates) - 1)]
    return torch.where(moves[:, None], taken, codebook), torch.where(moves, fresh, usage)
