"""Configuration of the `train-tokenizer` stage: every knob, its meaning and its limits."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.checks import at_least, flatten, require, to_dict
from pipelines.config.tracking import TrackingConfig

# What a resumed run may change: how it is computed, judged and reported, not what is computed.
MAY_CHANGE = (
    "images",
    "output",
    "log_every",
    "data.num_threads",
    "data.prefetch_batches",
    "scaling",
    "checkpoint",
    "gate",
    "tracking",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The discrete VAE. The defaults of `dalle` are the published DALL-E networks."""

    architecture: Literal["dvae", "dalle"] = "dvae"
    """dvae: space-to-depth stem, convolutions on the token grid, codebook started at k-means
    centres; dalle: OpenAI's encoder and decoder (stride 8), 20 times the compute."""
    image_size: int = 112
    """Side of the square token view, in pixels."""
    vocab_size: int = 8192
    """Number of visual tokens."""
    patch_size: int = 8
    """dvae: pixels per token and side; the grid is image_size / patch_size."""
    dim: int = 256
    """dvae: channels on the token grid."""
    encoder_blocks: int = 4
    """dvae: residual blocks before the tokens; each widens what a token sees by 2 tokens."""
    decoder_blocks: int = 6
    """dvae: residual blocks after the tokens."""
    hidden_dim: int = 256
    """dalle: channels of the first group; the last has 8 times as many."""
    init_dim: int = 128
    """dalle: width of the decoder's codebook."""
    blocks_per_group: int = 2
    """dalle: residual blocks in each of the four groups."""

    def __post_init__(self) -> None:
        require(
            self.architecture in ("dvae", "dalle"),
            "model.architecture",
            self.architecture,
            "choose dvae or dalle",
        )
        require(
            self.image_size >= self.stride and self.image_size % self.stride == 0,
            "model.image_size",
            self.image_size,
            f"must be a multiple of the {self.stride} pixels of a token",
        )
        require(
            2 <= self.vocab_size <= 65535,
            "model.vocab_size",
            self.vocab_size,
            "must be between 2 and 65535: token tables hold uint16, and one value says 'none'",
        )
        for name in ("patch_size", "dim", "hidden_dim", "init_dim", "blocks_per_group"):
            value = getattr(self, name)
            at_least(f"model.{name}", value, 1)
        for name in ("encoder_blocks", "decoder_blocks"):
            value = getattr(self, name)
            at_least(f"model.{name}", value, 0)

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return 8 if self.architecture == "dalle" else self.patch_size


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The evidence bound: reconstruction plus weighted KL to the uniform code distribution."""

    likelihood: Literal["logit_laplace", "mse"] = "logit_laplace"
    """logit_laplace: DALL-E's, with a learned scale per pixel; mse: a Gaussian of fixed width."""
    min_log_scale: float = -4.0
    """Lower bound of logit-Laplace's ln b; flat artwork would drive it to minus infinity."""
    kl_weight: float = 6.6
    """Weight of the KL term as DALL-E states it: per token it counts weight / (3 stride^2) beside
    the mean over pixels."""
    kl_warmup_steps: int = 5_000
    """Steps in which the KL weight rises from 0, on a cosine."""
    start_temperature: float = 1.0
    """Temperature of the Gumbel-softmax relaxation at the start."""
    end_temperature: float = 1 / 16
    """Temperature after temperature_steps and until the end."""
    temperature_steps: int = 150_000
    """Steps in which the temperature falls, on a cosine."""

    def __post_init__(self) -> None:
        require(
            self.likelihood in ("logit_laplace", "mse"),
            "loss.likelihood",
            self.likelihood,
            "choose logit_laplace or mse",
        )
        for name in ("kl_weight", "kl_warmup_steps", "temperature_steps"):
            value = getattr(self, name)
            at_least(f"loss.{name}", value, 0)
        require(
            0 < self.end_temperature <= self.start_temperature,
            "loss.end_temperature",
            self.end_temperature,
            f"must be above 0 and at most loss.start_temperature = {self.start_temperature}",
        )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The random views that the tokenizer learns from; take those it will label."""

    min_area: float = 0.2
    """Smallest share of the image that a crop covers."""
    max_area: float = 1.0
    """Largest share."""
    min_aspect: float = 3 / 4
    """Smallest width over height of a crop."""
    max_aspect: float = 4 / 3
    """Largest width over height."""
    flip_probability: float = 0.5
    """Share of views that are mirrored."""
    jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; BEiT's views use 0.4."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images are read and put in order."""

    global_batch_size: int = 512
    """Images per step over all workers; a multiple of num_shards."""
    num_shards: int = 8
    """Canonical shards of the sample order; a multiple of every number of workers ever used."""
    window: int = 2048
    """Rows of a shard that are permuted together: the unit of reading."""
    num_threads: int = 0
    """Decoding threads per worker; 0: scaling.cpus_per_worker."""
    prefetch_batches: int = 2
    """Batches decoded ahead per worker."""
    codebook_images: int = 1024
    """dvae: images whose patches start the codebook."""

    def __post_init__(self) -> None:
        for name in ("num_shards", "window", "prefetch_batches", "codebook_images"):
            value = getattr(self, name)
            at_least(f"data.{name}", value, 1)
        at_least("data.num_threads", self.num_threads, 0)
        require(
            self.global_batch_size > 0 and self.global_batch_size % self.num_shards == 0,
            "data.global_batch_size",
            self.global_batch_size,
            f"must be a positive multiple of data.num_shards = {self.num_shards}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, cosine and weight averaging; the defaults are DALL-E's."""

    steps: int = 200_000
    """Length of the run in optimizer steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1.25e-6
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null: no clipping."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is saved; lower in the first steps. 0: none."""

    def __post_init__(self) -> None:
        at_least("optim.steps", self.steps, 1)
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(
            0 <= self.min_lr <= self.lr,
            "optim.min_lr",
            self.min_lr,
            f"must be between 0 and optim.lr = {self.lr}",
        )
        require(
            0 <= self.warmup_steps < self.steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"must be at least 0 and below optim.steps = {self.steps}",
        )
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "optim.clip_grad_norm",
            self.clip_grad_norm,
            "must be positive, or null for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """On how much a step is computed."""

    num_workers: int = 1
    """Training workers of Ray Train; 0: this process alone."""
    use_gpu: bool = False
    """One CUDA device per worker."""
    cpus_per_worker: int = 1
    """CPUs reserved per worker, for decoding and, without GPU, for the step itself."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16: autocast with float32 weights; auto: bf16 on CUDA, float32 on CPU."""
    compile: bool = False
    """torch.compile the step."""
    max_failures: int = 8
    """Restarts of the worker group before the run fails."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_failures"):
            value = getattr(self, name)
            at_least(f"scaling.{name}", value, 0)
        require(
            self.cpus_per_worker >= 1,
            "scaling.cpus_per_worker",
            self.cpus_per_worker,
            "must be at least 1",
        )
        require(
            self.precision in ("auto", "float32", "bf16"),
            "scaling.precision",
            self.precision,
            "choose auto, float32 or bf16",
        )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return self.num_workers, self.num_workers


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a killed run continues from. Checkpoints are removed when the tokenizer is finished."""

    every_steps: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Complete checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            at_least(f"checkpoint.{name}", value, 1)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a tokenizer counts as collapsed; then the stage fails and saves none."""

    min_perplexity: float = 8.0
    """exp(entropy) of the tokens' frequencies, in training after grace_steps and at the end."""
    min_codes: int = 16
    """Codes used at least once, at the end."""
    grace_steps: int = 1000
    """Steps before the training tokens are judged."""
    num_images: int = 1024
    """Images scored at the end, spread over the table, on views that training did not use."""

    def __post_init__(self) -> None:
        at_least("gate.num_images", self.num_images, 1)
        at_least("gate.grace_steps", self.grace_steps, 0)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """A discrete VAE trained on an image table, with a Gumbel-softmax relaxation."""

    images: str
    """URI of the image table."""
    output: str
    """URI of the tokenizer directory. The same one continues an interrupted run."""
    seed: int = 0
    """Initial weights, order of samples, views and relaxation noise follow from it."""
    log_every: int = 20
    """Steps between logs; the device is waited for only then."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        at_least("log_every", self.log_every, 1)
        require(
            self.loss.temperature_steps <= self.optim.steps,
            "loss.temperature_steps",
            self.loss.temperature_steps,
            f"must be at most optim.steps = {self.optim.steps}, or the codes never become discrete",
        )
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
