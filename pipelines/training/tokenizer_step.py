"""The parts of a tokenizer's training step: network, loss, schedules, noise, averaged weights."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit import counters
from beit.schedules import warmup_cosine
from beit.tokenizers import DalleTokenizer, DvaeTokenizer, ImageTokenizer
from beit.tokenizers.base import map_pixels
from beit.tokenizers.dvae import (
    exponential_noise,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_loss,
    mse_loss,
)
from beit.view_policy import Framing, ViewPolicy
from pipelines.config.train_tokenizer import (
    LossConfig,
    ModelConfig,
    TrainTokenizerConfig,
    ViewsConfig,
)
from pipelines.errors import InputError
from pipelines.reading.pixels import drawn, read_pixels
from pipelines.sample_order import SampleOrder
from pipelines.scorecard import sample_rows
from pipelines.tables.image_table import ImageTable
from pipelines.training.distributed import World

CODEBOOK_VIEW = 2**48 + 1
"""Index of the view that starts the codebook; training uses the epoch's number."""
AVERAGE = "average."
"""Prefix of the averaged weights in a checkpoint."""


def build_tokenizer(config: ModelConfig, *, seed: int) -> ImageTokenizer:
    """The untrained network; its weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.architecture == "dalle":
            return DalleTokenizer(
                image_size=config.image_size,
                hidden_dim=config.hidden_dim,
                init_dim=config.init_dim,
                blocks_per_group=config.blocks_per_group,
                vocab_size=config.vocab_size,
            )
        return DvaeTokenizer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=config.dim,
            vocab_size=config.vocab_size,
            encoder_blocks=config.encoder_blocks,
            decoder_blocks=config.decoder_blocks,
        )


def view_policy(config: ViewsConfig, *, seed: int) -> ViewPolicy:
    """The distribution of training views."""
    framing = {field.name: getattr(config, field.name) for field in dataclasses.fields(Framing)}
    jitter = config.jitter
    return ViewPolicy(seed=seed, brightness=jitter, contrast=jitter, saturation=jitter, **framing)


class RelaxedVae(nn.Module):
    """A tokenizer as it is trained: images and noise to the loss."""

    def __init__(self, tokenizer: ImageTokenizer, config: LossConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        # DALL-E divides the whole bound by the number of pixel values; the KL of a token spreads
        # over the 3 stride^2 of them that it stands for.
        self.kl_share = 1 / (3 * tokenizer.stride**2)

    def reconstruction_loss(self, z: Tensor, pixels: Tensor) -> Tensor:
        """Negative log-likelihood per pixel value of the pictures decoded from z."""
        decoder = self.tokenizer.decoder
        assert decoder is not None
        outputs = decoder(z)
        if self.config.likelihood == "mse":
            return mse_loss(outputs, pixels)
        return logit_laplace_loss(outputs, pixels, min_log_scale=self.config.min_log_scale)

    def forward(
        self, images: Tensor, noise: Tensor, temperature: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (B,3,H,W), exponential noise (B,V,h,w) -> loss, (loss, reconstruction, KL), codes.

        The second is detached; codes int64 (B*h*w,) are the most likely ones.
        """
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        logits = self.tokenizer.encoder(pixels).float()
        z = gumbel_softmax(logits, noise, temperature)
        reconstruction = self.reconstruction_loss(z, pixels)
        kl = kl_to_uniform(logits)
        loss = reconstruction + kl_weight * self.kl_share * kl
        with torch.no_grad():
            codes = logits.argmax(1).flatten()
            terms = torch.stack([loss, reconstruction, kl])
        return loss, terms, codes

    @torch.no_grad()
    def hard_reconstruction(self, images: Tensor) -> Tensor:
        """The reconstruction loss from the tokens themselves, as a user of them gets it."""
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        token_ids = self.tokenizer.encoder(pixels).argmax(1)
        one_hot = F.one_hot(token_ids, self.tokenizer.vocab_size).movedim(-1, 1)
        return self.reconstruction_loss(one_hot.to(torch.float32), pixels)


def cosine_between(step: int, *, num_steps: int, start: float, end: float) -> float:
    """`start` at step 0, `end` from `num_steps` on, half a cosine in between."""
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def relaxation_noise(
    *, seed: int, step: int, shards: Iterable[int], shape: tuple[int, int, int, int], device: str
) -> Tensor:
    """Noise for the images of one rank: `shape` (B,V,h,w) for each of its canonical shards.

    A pure function of seed, step and shard, so it does not depend on the number of workers.
    """
    parts = []
    for shard in shards:
        generator = torch.Generator(device)
        generator.manual_seed(counters.device_seed(seed, step, shard))
        parts.append(exponential_noise(shape, generator))
    return torch.cat(parts)


class AveragedWeights:
    """Exponential moving average of parameters.

    The first steps count less than the decay says, or the average would remember the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes over the parameters after `step` (counted from 0) by one step of the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.values.values())
        torch._foreach_lerp_(averages, list(self.parameters.values()), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, on the CPU."""
        return {
            AVERAGE + name: value.to("cpu", copy=True).contiguous()
            for name, value in self.values.items()
        }

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """From a checkpoint's weights."""
        for name, value in self.values.items():
            value.copy_(weights[AVERAGE + name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the parameters of `model`."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])


def sample_order(config: TrainTokenizerConfig, images: ImageTable) -> SampleOrder:
    """The order of samples. Raises InputError for a batch larger than the table."""
    return SampleOrder(
        images.row_groups.sizes,
        seed=config.seed,
        global_batch_size=config.data.global_batch_size,
        num_shards=config.data.num_shards,
        window=config.data.window,
    )


def learning_rate(config: TrainTokenizerConfig, step: int) -> float:
    """Linear warm-up from the first step on, then a cosine; a pure function of the step."""
    optim = config.optim
    return warmup_cosine(
        step,
        total_steps=optim.steps,
        warmup_steps=optim.warmup_steps,
        peak=optim.lr,
        final=optim.min_lr,
    )


def relaxation(config: TrainTokenizerConfig, step: int) -> tuple[float, float]:
    """Temperature and KL weight of a step (counted from 0)."""
    loss = config.loss
    temperature = cosine_between(
        step,
        num_steps=loss.temperature_steps,
        start=loss.start_temperature,
        end=loss.end_temperature,
    )
    kl_weight = cosine_between(step, num_steps=loss.kl_warmup_steps, start=0.0, end=loss.kl_weight)
    return temperature, kl_weight


def start_codebook(
    tokenizer: ImageTokenizer, config: TrainTokenizerConfig, images: ImageTable, device: str
) -> None:
    """K-means centres of real patches, see `beit.tokenizers.dvae`."""
    if not isinstance(tokenizer, DvaeTokenizer):
        return
    rows = sample_rows(images, config.data.codebook_images)
    policy = view_policy(config.views, seed=config.seed)
    (pixels,) = read_pixels(
        images,
        rows,
        drawn(policy, CODEBOOK_VIEW),
        tokenizer.image_size,
        tokenizer.interpolation,
        batch_size=len(rows),
    )
    batch = torch.from_numpy(pixels).to(device)
    tokenizer.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        tokenizer.initialise_from(batch, generator=generator)
    except ValueError as error:
        raise InputError(f"data.codebook_images = {len(batch)}: {error}") from error


def uses_bfloat16(config: TrainTokenizerConfig, world: World) -> bool:
    """Whether the step is autocast."""
    chosen = config.scaling.precision
    return chosen == "bf16" or (chosen == "auto" and world.device.type == "cuda")
