"""A discrete VAE in training: the relaxed loss, its schedules and noise, averaged weights.

Provenance: DALL-E (arXiv 2102.12092), appendix A.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit import counters
from beit.tokenizers.base import ImageTokenizer
from beit.tokenizers.discrete_vae import DiscreteVae, map_pixels
from beit.tokenizers.dvae import (
    exponential_noise,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_loss,
    mse_loss,
)
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.training.tokenizer_step import Learner, Outcome

AVERAGE = "average."
"""Prefix of the averaged weights in a checkpoint."""


class RelaxedVae(Learner):
    """A discrete VAE as it is trained; its averaged weights are what is saved."""

    terms = ("loss", "reconstruction", "kl")
    tokenizer: DiscreteVae

    def __init__(
        self,
        tokenizer: DiscreteVae,
        config: TrainTokenizerConfig,
        *,
        shards: Iterable[int],
        shard_batch_size: int,
    ) -> None:
        """`shards` are the canonical shards of this worker, of so many images a step each."""
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        self.shards = tuple(shards)
        self.noise_shape = (shard_batch_size, tokenizer.vocab_size, *tokenizer.grid_size)
        # DALL-E divides the whole bound by the number of pixel values; the KL of a token spreads
        # over the 3 stride^2 of them that it stands for.
        self.kl_share = 1 / (3 * tokenizer.stride**2)
        self.average = AveragedWeights(tokenizer, config.optim.ema_decay)

    def prepare(self, images: Tensor, step: int) -> tuple[Tensor, ...]:
        """Exponential noise (B,V,h,w), temperature, weight of the KL term."""
        temperature, kl_weight = relaxation(self.config, step)
        noise = relaxation_noise(
            seed=self.config.seed,
            step=step,
            shards=self.shards,
            shape=self.noise_shape,
            device=str(images.device),
        )
        return noise, torch.tensor(temperature), torch.tensor(kl_weight)

    def forward(self, images: Tensor, *prepared: Tensor) -> Outcome:
        """Terms: loss, reconstruction, KL; codes are the most likely ones."""
        noise, temperature, kl_weight = prepared
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        logits = self.tokenizer.encoder(pixels).float()
        z = gumbel_softmax(logits, noise, temperature)
        reconstruction = self.reconstruction_loss(z, pixels)
        kl = kl_to_uniform(logits)
        loss = reconstruction + kl_weight * self.kl_share * kl
        with torch.no_grad():
            codes = logits.argmax(1).flatten()
            terms = torch.stack([loss, reconstruction, kl])
        return Outcome(loss, terms, codes)

    def reconstruction_loss(self, z: Tensor, pixels: Tensor) -> Tensor:
        """Negative log-likelihood per pixel value of the pictures decoded from z."""
        decoder, how = self.tokenizer.decoder, self.config.loss
        assert decoder is not None
        outputs = decoder(z)
        if how.likelihood == "mse":
            return mse_loss(outputs, pixels)
        return logit_laplace_loss(outputs, pixels, min_log_scale=how.min_log_scale)

    def after_step(self, outcome: Outcome, step: int) -> None:  # noqa: ARG002
        self.average.update(step)

    @torch.no_grad()
    def figures(self, images: Tensor, step: int) -> dict[str, float]:
        temperature, kl_weight = relaxation(self.config, step)
        return {
            "hard_reconstruction": float(self.hard_reconstruction(images)),
            "temperature": temperature,
            "kl_weight": kl_weight,
        }

    @torch.no_grad()
    def hard_reconstruction(self, images: Tensor) -> Tensor:
        """The reconstruction loss from the tokens themselves, as a user of them gets it."""
        pixels = map_pixels(images).contiguous(memory_format=torch.channels_last)
        token_ids = self.tokenizer.encoder(pixels).argmax(1)
        one_hot = F.one_hot(token_ids, self.tokenizer.vocab_size).movedim(-1, 1)
        return self.reconstruction_loss(one_hot.to(torch.float32), pixels)

    def state(self) -> dict[str, Tensor]:
        return self.average.state()

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        self.average.restore(weights)

    def finish(self) -> ImageTokenizer:
        if self.config.optim.ema_decay > 0:
            self.average.copy_to(self.tokenizer)
        return self.tokenizer


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
