"""What tokenizers of all kinds share in training: the protocol, networks, views, schedule."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from beit.schedules import warmup_cosine
from beit.tokenizers import (
    DalleTokenizer,
    DvaeTokenizer,
    ImageTokenizer,
    KmeansTokenizer,
    ProjectionTokenizer,
    VqkdTokenizer,
)
from beit.view_policy import Framing, ViewPolicy
from pipelines.config.train_tokenizer import (
    ModelConfig,
    TrainTokenizerConfig,
    ViewsConfig,
)
from pipelines.errors import InputError
from pipelines.reading.pixels import drawn, read_pixels
from pipelines.scorecard import sample_rows
from pipelines.tables.image_table import ImageTable
from pipelines.training.distributed import World

CODEBOOK_VIEW = 2**48 + 1
"""Index of the view that starts the codebook; training uses the epoch's number."""


class Outcome(NamedTuple):
    """What a batch gives its step; everything on the device."""

    loss: Tensor
    """(), the mean over the images of this worker; minimised."""
    terms: Tensor
    """float32 (K,), likewise and detached: `Learner.terms`."""
    codes: Tensor
    """int64 (B*h*w,): the tokens."""
    states: Tensor | None = None
    """float32 (B*h*w, D), detached: what was matched with the codebook, where the step moves it."""


class Learner(nn.Module):
    """What the loop asks of a kind of tokenizer that is trained.

    A module, since DDP and compile wrap it whole. Its parameters are those of `trained`.
    """

    #: Names of the terms, "loss" first.
    terms: ClassVar[tuple[str, ...]]
    tokenizer: ImageTokenizer

    @property
    def trained(self) -> nn.Module:
        """What is optimised and checkpointed, whole."""
        return self.tokenizer

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        return [{"params": list(self.trained.parameters()), "weight_decay": weight_decay}]

    def prepare(self, images: Tensor, step: int) -> tuple[Tensor, ...]:
        """What `forward` takes beside the images uint8 (B,3,H,W), without a gradient."""
        raise NotImplementedError

    def forward(self, images: Tensor, *prepared: Tensor) -> Outcome:
        """The loss of a worker's batch."""
        raise NotImplementedError

    def after_step(self, outcome: Outcome, step: int) -> None:
        """What follows the update of the weights."""
        raise NotImplementedError

    def figures(self, images: Tensor, step: int) -> dict[str, float]:
        """What is logged besides the terms, by the last batch of a period."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides `trained`, on the CPU."""
        return {}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""

    def finish(self) -> ImageTokenizer:
        """The tokenizer that is judged and saved."""
        return self.tokenizer


def build_tokenizer(config: ModelConfig, *, seed: int) -> ImageTokenizer:
    """The untrained network; its weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.kind == "kmeans":
            return KmeansTokenizer(
                image_size=config.image_size,
                patch_size=config.patch_size,
                vocab_size=config.vocab_size,
            )
        if config.kind == "projection":
            return ProjectionTokenizer(
                image_size=config.image_size,
                patch_size=config.patch_size,
                vocab_size=config.vocab_size,
                code_dim=config.code_dim,
            )
        if config.kind == "vqkd":
            return VqkdTokenizer(
                image_size=config.image_size,
                patch_size=config.patch_size,
                dim=config.dim,
                depth=config.depth,
                num_heads=config.heads,
                vocab_size=config.vocab_size,
                code_dim=config.code_dim,
            )
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


def start_codebook(
    tokenizer: ImageTokenizer, config: TrainTokenizerConfig, images: ImageTable, device: str
) -> None:
    """Places what a codebook starts from, or consists of, by real patches.

    Raises:
        InputError: fewer patches than codes.
    """
    if isinstance(tokenizer, DalleTokenizer | VqkdTokenizer):
        return  # VQ-KD's starts from states of its first batch
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
        if isinstance(tokenizer, DvaeTokenizer):
            tokenizer.initialise_from(batch, generator=generator)
        elif isinstance(tokenizer, KmeansTokenizer):
            tokenizer.fit(batch, generator=generator)
        elif isinstance(tokenizer, ProjectionTokenizer):
            tokenizer.fit(batch)
    except ValueError as error:
        raise InputError(f"data.codebook_images = {len(batch)}: {error}") from error


def uses_bfloat16(config: TrainTokenizerConfig, world: World) -> bool:
    """Whether the step is autocast."""
    chosen = config.scaling.precision
    return chosen == "bf16" or (chosen == "auto" and world.device.type == "cuda")
