"""Our own discrete VAE: small enough for two CPU cores, and trained like DALL-E's.

A space-to-depth stem turns patches into channels at once, so that every convolution runs on the
token grid. Residual branches start at zero and stem and head are orthogonal maps: the untrained
network is exactly a Gaussian mixture over patches, and `initialise_from` can start it at k-means
centres of real patches. That is what keeps the codebook in use (an encoder that starts from noise
collapses to a handful of codes within a hundred steps on little data).

Relaxation, KL term and logit-Laplace likelihood are those of the DALL-E paper (arXiv 2102.12092,
appendix A); they are pure functions of tensors, and the noise is an argument.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.tokenizers.clustering import kmeans
from beit.tokenizers.discrete_vae import PIXEL_MARGIN, DiscreteVae, map_pixels

SHARPNESS = 0.3
"""Share of the mixture's own precision that the starting posterior gets."""


def _zero(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + conv1x1(ReLU(conv3x3(ReLU(x)))); the last convolution starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.proj = nn.Conv2d(dim, dim, 1)
        _zero(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.proj(F.relu(self.conv(F.relu(x))))
        return out


def _orthogonal(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.orthogonal_(conv.weight.view(conv.weight.shape[0], -1))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _own_precision(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution from or to codes, which autocast does not reach: rounded, tokens change."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = conv(x.to(conv.weight.dtype))
    return out


class PatchEncoder(nn.Module):
    """images (B,3,H,W) in [0.1, 0.9] -> logits (B, vocab_size, H/patch, W/patch)."""

    def __init__(self, *, patch_size: int, dim: int, num_blocks: int, vocab_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stem = _orthogonal(nn.Conv2d(3 * patch_size**2, dim, 1))
        self.blocks = nn.Sequential(*[ResidualBlock(dim) for _ in range(num_blocks)])
        self.head = nn.Conv2d(dim, vocab_size, 1)

    def features(self, images: Tensor) -> Tensor:
        """(B, dim, h, w): what the head sees."""
        patches = F.pixel_unshuffle(images - 0.5, self.patch_size)
        x = self.stem(patches.to(self.stem.weight.dtype))
        out: Tensor = self.blocks(x)
        return out

    def half_trunk(self) -> None:
        """float16 in all but the head."""
        self.stem.to(torch.float16)
        self.blocks.to(torch.float16)

    def forward(self, images: Tensor) -> Tensor:
        return _own_precision(self.head, self.features(images))


class PatchDecoder(nn.Module):
    """z (B, vocab_size, h, w), one-hot or soft -> (B, 6, H, W): mu and ln b of logit-Laplace."""

    def __init__(self, *, patch_size: int, dim: int, num_blocks: int, vocab_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.codebook = nn.Conv2d(vocab_size, dim, 1, bias=False)
        self.blocks = nn.Sequential(*[ResidualBlock(dim) for _ in range(num_blocks)])
        self.mu = _orthogonal(nn.Conv2d(dim, 3 * patch_size**2, 1))
        self.log_scale = nn.Conv2d(dim, 3 * patch_size**2, 1)
        _zero(self.log_scale)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(_own_precision(self.codebook, z))
        maps = [F.pixel_shuffle(head(x), self.patch_size) for head in (self.mu, self.log_scale)]
        return torch.cat(maps, dim=1)


class DvaeTokenizer(DiscreteVae):
    """A discrete VAE on `patch_size` patches: grid = image_size / patch_size."""

    architecture: ClassVar[str] = "dvae"

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        vocab_size: int,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
    ) -> None:
        for name, value in {"patch_size": patch_size, "dim": dim, "vocab_size": vocab_size}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        super().__init__(
            PatchEncoder(
                patch_size=patch_size, dim=dim, num_blocks=encoder_blocks, vocab_size=vocab_size
            ),
            PatchDecoder(
                patch_size=patch_size, dim=dim, num_blocks=decoder_blocks, vocab_size=vocab_size
            ),
            image_size=image_size,
            stride=patch_size,
            vocab_size=vocab_size,
        )
        self._model_config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "dim": dim,
            "vocab_size": vocab_size,
            "encoder_blocks": encoder_blocks,
            "decoder_blocks": decoder_blocks,
        }

    def model_config(self) -> dict[str, Any]:
        return dict(self._model_config)

    @torch.no_grad()
    def initialise_from(
        self, images: Tensor, *, generator: torch.Generator, num_iterations: int = 12
    ) -> None:
        """Start the codebook at k-means centres of the patches of `images` (uint8 (B,3,H,W)).

        The encoder's head becomes the log posterior of a Gaussian mixture with these centres and
        their mean squared distance as variance, the decoder's codebook the centres in logit space.
        Raises ValueError for fewer patches than codes.
        """
        encoder, decoder = self.encoder, self.decoder
        assert isinstance(encoder, PatchEncoder)
        assert isinstance(decoder, PatchDecoder)
        assert encoder.head.bias is not None
        assert encoder.stem.bias is not None
        assert decoder.mu.bias is not None
        assert decoder.log_scale.bias is not None
        pixels = map_pixels(images)
        patches = F.pixel_unshuffle(pixels, self.stride).movedim(1, -1).flatten(0, 2)
        centres, error = kmeans(
            patches, self.vocab_size, generator=generator, num_iterations=num_iterations
        )
        low = PIXEL_MARGIN / 2
        targets = torch.logit(centres.clamp(low, 1 - low))
        if encoder.stem.out_channels < patches.shape[1]:
            # Too narrow to hold a patch: keep its principal components, not random directions.
            mean, basis = _principal_components(patches, encoder.stem.out_channels)
            encoder.stem.weight.copy_(basis[:, :, None, None])
            encoder.stem.bias.copy_(-basis @ (mean - 0.5))
            mean, basis = _principal_components(targets, encoder.stem.out_channels)
            decoder.mu.weight.copy_(basis.T[:, :, None, None])
            decoder.mu.bias.copy_(mean)
        projected = (centres - 0.5) @ encoder.stem.weight.flatten(1).T + encoder.stem.bias
        # At full precision posteriors are certain, and their gradients gone, before training.
        precision = SHARPNESS / (2 * max(error / patches.shape[1], 1e-4))
        encoder.head.weight.copy_((2 * precision * projected)[:, :, None, None])
        encoder.head.bias.copy_(-precision * projected.square().sum(1))
        # The columns of the mu head are orthonormal, or its rows: the transpose is its inverse.
        codes = (targets - decoder.mu.bias) @ decoder.mu.weight.flatten(1)
        decoder.codebook.weight.copy_(codes.T[:, :, None, None])
        decoder.log_scale.bias.fill_(math.log(max(math.sqrt(error / patches.shape[1]) * 4, 1e-2)))
        self._fingerprint = None


def _principal_components(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the `count` leading orthonormal directions (count, D)."""
    mean = points.mean(0)
    _, _, directions = torch.linalg.svd((points - mean).T @ (points - mean))
    return mean, directions[:count]


def exponential_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Exponential noise of rate 1 for `gumbel_softmax`, float32 on the generator's device.

    By inversion: torch's own `exponential_` takes ten times as long on a CPU. The smallest value
    is 2**-25, so that no draw wins against any posterior.
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.neg_().log1p_().neg_().clamp_(min=2**-25)


def gumbel_softmax(logits: Tensor, noise: Tensor, temperature: float | Tensor) -> Tensor:
    """Relaxed one-hot (B,V,h,w) from logits and `noise` of the same shape, exponential of rate 1.

    Minus the logarithm of such noise is Gumbel-distributed.
    """
    return F.softmax((logits - torch.log(noise)) / temperature, dim=1)


def logit_laplace_loss(outputs: Tensor, pixels: Tensor, *, min_log_scale: float = -6.0) -> Tensor:
    """Mean over pixels and channels of the logit-Laplace negative log-likelihood, in nats.

    `outputs` (B,6,H,W) holds mu and ln b, `pixels` (B,3,H,W) lies in (0,1). `min_log_scale` bounds
    ln b: flat artwork repeats one exact value, where the likelihood would otherwise grow for ever.
    """
    mu, log_scale = outputs.float().chunk(2, dim=1)
    log_scale = log_scale.clamp(min=min_log_scale)
    error = (torch.logit(pixels) - mu).abs()
    constant = math.log(2) + torch.log(pixels) + torch.log1p(-pixels)
    return (error * torch.exp(-log_scale) + log_scale + constant).mean()


def mse_loss(outputs: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of the reconstruction in [0.1, 0.9], as a Gaussian with sigma 0.1."""
    mu, _ = outputs.float().chunk(2, dim=1)
    return (torch.sigmoid(mu) - pixels).square().mean() / (2 * 0.1**2)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) per token, mean over batch and grid, in nats."""
    log_probs = F.log_softmax(logits.float(), dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return math.log(logits.shape[1]) - entropy.mean()
