"""VQ-KD as upstream computes it, written anew after its layout: the other side of parity tests.

Names, order of operations and constants follow microsoft/unilm at 768a3c8, `beit2/` (VQKD, its
vision transformer and its quantiser): attention by explicit softmax, quantiser by one-hot products,
codebook moved inside `forward`.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PeerBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn.q_bias = nn.Parameter(torch.randn(dim) * 0.1)
        self.attn.v_bias = nn.Parameter(torch.randn(dim) * 0.1)
        self.attn.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, 4 * dim)
        self.mlp.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        count, tokens, dim = x.shape
        bias = torch.cat((self.attn.q_bias, torch.zeros(dim), self.attn.v_bias))
        qkv = F.linear(self.norm1(x), self.attn.qkv.weight, bias)
        q, k, v = qkv.reshape(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * (dim // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).reshape(count, tokens, dim))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class PeerTransformer(nn.Module):
    """Patch tokens after `fc_norm`."""

    def __init__(self, size, patch, channels, dim, depth, heads):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.5)
        self.blocks = nn.ModuleList(PeerBlock(dim, heads) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(round((x.shape[1] - 1) ** 0.5))
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])

    def positions(self, side):
        """Upstream's `interpolate_pos_encoding`, with its tenth of a patch."""
        old = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == old:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:].mT.unflatten(2, (old, old))
        patches = F.interpolate(patches, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
        return torch.cat((cls, patches.flatten(2).mT), dim=1)


class PeerQuantizer(nn.Module):
    def __init__(self, codes, dim, decay):
        super().__init__()
        self.decay = decay
        self.embedding = nn.Module()
        weight = F.normalize(torch.randn(codes, dim), dim=1)
        self.embedding.weight = nn.Parameter(weight, requires_grad=False)
        self.embedding.cluster_size = nn.Parameter(torch.zeros(codes), requires_grad=False)
        self.embedding.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.embedding.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(codes))

    def forward(self, z):
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        flat, weight = z.flatten(0, 2), self.embedding.weight
        distances = flat.pow(2).sum(1, keepdim=True) + weight.pow(2).sum(1) - 2 * flat @ weight.T
        codes = distances.argmin(1)
        found = F.embedding(codes, weight).view(z.shape)
        if self.training:
            one_hot = F.one_hot(codes, len(weight)).to(z.dtype)
            counts = one_hot.sum(0)
            means = F.normalize((flat.detach().T @ one_hot / counts.clamp(min=1)).T, dim=-1)
            means = torch.where(counts[:, None] == 0, weight, means)
            moved = F.normalize(self.decay * weight + (1 - self.decay) * means, dim=-1)
            weight.data.copy_(moved)
        loss = F.mse_loss(found.detach(), z)
        found = z + (found - z).detach()
        return found.permute(0, 3, 1, 2), loss, codes


class PeerVqkd(nn.Module):
    def __init__(self, *, size, patch, dim, depth, heads, codes, code_dim, decoder_depth, out_dim,
                 decay=0.99):  # fmt: skip
        super().__init__()
        self.encoder = PeerTransformer(size, patch, 3, dim, depth, heads)
        self.decoder = PeerTransformer(size // patch, 1, code_dim, dim, decoder_depth, heads)
        self.quantize = PeerQuantizer(codes, code_dim, decay)
        self.encode_task_layer = self.task(dim, code_dim)
        self.decode_task_layer = self.task(dim, out_dim)

    @staticmethod
    def task(dim, out_dim):
        return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim))

    def encode(self, pixels):
        """Pixels in [0, 255]."""
        states = self.encode_task_layer(self.encoder(pixels / 127.5 - 1))
        side = round(states.shape[1] ** 0.5)
        maps = states.transpose(1, 2).unflatten(2, (side, side))
        return self.quantize(maps)

    def tokens(self, pixels):
        return self.encode(pixels)[2].view(len(pixels), -1)

    def forward(self, pixels, target):
        found, commitment, _ = self.encode(pixels)
        predicted = self.decode_task_layer(self.decoder(found))
        target = target / target.norm(dim=-1, keepdim=True)
        predicted = predicted / predicted.norm(dim=-1, keepdim=True)
        features = (1 - (target * predicted).sum(-1)).mean()
        return features + commitment, features, commitment


def peer(seed=0, **changes):
    """A tiny network with weights that tell patches apart, as training would."""
    sizes = {"size": 32, "patch": 8, "dim": 128, "depth": 2, "heads": 2, "codes": 700,
             "code_dim": 8, "decoder_depth": 2, "out_dim": 12}  # fmt: skip
    torch.manual_seed(seed)
    model = PeerVqkd(**{**sizes, **changes})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(2)
    return model
