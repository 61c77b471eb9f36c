"""Configuration of the `pretrain` stage: every knob, its meaning and its limits."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.checks import at_least, one_of, require
from pipelines.config.tracking import TrackingConfig

Action = Literal["off", "warn", "stop", "rollback"]
ACTIONS = ("off", "warn", "stop", "rollback")

# What a resumed run may change: how it is computed, watched and reported. Everything else decides
# what is computed, and a change to it asks for another run directory. `images` and `tokens` may
# move to another URI: their fingerprints are compared instead.
MAY_CHANGE = (
    "images",
    "tokens",
    "tokenizer",
    "output",
    "name",
    "log_every",
    "pictures_every",
    "data.executor",
    "data.num_threads",
    "data.prefetch_batches",
    "scaling.num_workers",
    "scaling.use_gpu",
    "scaling.cpus_per_worker",
    "scaling.strategy",
    "scaling.compile",
    "scaling.accumulate_steps",
    "scaling.activation_checkpointing",
    "scaling.max_failures",
    "scaling.peak_tflops",
    "checkpoint",
    "health",
    "probe",
    "tracking",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder; the defaults are BEiT-Base as released. The vocabulary is the token table's."""

    image_size: int = 224
    """Side of the square patch view, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; image_size / patch_size must give the token table's grid."""
    dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; must divide dim."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, in units of dim."""
    absolute_positions: bool = False
    """Learned absolute position embeddings (the paper's plain model)."""
    relative_positions: Literal["none", "shared", "per_block"] = "shared"
    """Relative position bias: one table for all blocks (as released), one per block, or none."""
    layer_scale_init: float | None = 0.1
    """Initial layer scale (0.1 base, 1e-5 large); null: no layer scale."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        sides_fit = self.patch_size > 0 and self.image_size % self.patch_size == 0
        require(
            self.image_size > 0 and sides_fit,
            "model.image_size",
            self.image_size,
            f"must be a positive multiple of model.patch_size = {self.patch_size}",
        )
        at_least("model.depth", self.depth, 1)
        require(
            self.num_heads > 0 and self.dim % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide model.dim = {self.dim}",
        )
        one_of("model.relative_positions", self.relative_positions, ("none", "shared", "per_block"))
        require(
            0.0 <= self.drop_path < 1.0,
            "model.drop_path",
            self.drop_path,
            "must be in [0, 1)",
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and row."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return self.grid_size[0] * self.grid_size[1]


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which patches are hidden; a pure function of (seed, image digest, epoch)."""

    kind: Literal["blockwise", "random"] = "blockwise"
    """blockwise as in BEiT, or independent random patches."""
    num_masked: int = 75
    """Patches hidden per image; at most that many for blockwise without `exact`."""
    min_block: int = 16
    """Smallest block, in patches (blockwise)."""
    exact: bool = False
    """Exactly num_masked patches (BEiT v2) instead of at most (BEiT as coded)."""

    def __post_init__(self) -> None:
        one_of("masking.kind", self.kind, ("blockwise", "random"))
        at_least("masking.num_masked", self.num_masked, 1)
        require(
            self.kind == "random" or 0 < self.min_block <= self.num_masked,
            "masking.min_block",
            self.min_block,
            f"must be between 1 and masking.num_masked = {self.num_masked}; "
            "larger blocks would leave most images without any masked patch",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The order of samples, which no number of workers changes, and who decodes."""

    global_batch_size: int = 2048
    """Images per step over all workers and accumulation."""
    num_shards: int = 8
    """Canonical shards of the order: the largest number of workers; divides global_batch_size."""
    window: int = 1024
    """Rows of a shard that are shuffled together and held as encoded bytes."""
    executor: Literal["threads", "ray_tasks"] = "threads"
    """Who decodes: threads of the training worker, or Ray tasks on any node of the cluster."""
    num_threads: int = 0
    """Decoding threads per worker; 0: scaling.cpus_per_worker."""
    prefetch_batches: int = 2
    """Batches decoded ahead per worker."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Pixels in [0, 1] are normalised by (x - mean) / std; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """See mean."""

    def __post_init__(self) -> None:
        at_least("data.num_shards", self.num_shards, 1)
        require(
            self.global_batch_size > 0 and self.global_batch_size % self.num_shards == 0,
            "data.global_batch_size",
            self.global_batch_size,
            f"must be a positive multiple of data.num_shards = {self.num_shards}",
        )
        at_least("data.window", self.window, 1)
        one_of("data.executor", self.executor, ("threads", "ray_tasks"))
        at_least("data.num_threads", self.num_threads, 0)
        at_least("data.prefetch_batches", self.prefetch_batches, 1)
        require(min(self.std) > 0, "data.std", self.std, "every entry must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are those of BEiT on ImageNet-1k."""

    epochs: float = 800.0
    """Length of the run in passes over the images; `steps` overrides it."""
    steps: int | None = None
    """Length of the run in optimizer steps."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 10.0
    """Linear warm-up in epochs; `warmup_steps` overrides it."""
    warmup_steps: int | None = None
    """Linear warm-up in steps."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors, position and class tokens have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad_norm: float | None = 3.0
    """Largest gradient norm; null: no clipping."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, "optim.epochs", self.epochs, "must be positive")
        require(self.steps is None or self.steps > 0, "optim.steps", self.steps, "must be positive")
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(
            0 <= self.min_lr <= self.lr,
            "optim.min_lr",
            self.min_lr,
            f"must be between 0 and optim.lr = {self.lr}",
        )
        at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "optim.warmup_steps",
            self.warmup_steps,
            "must be >= 0",
        )
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "optim.clip_grad_norm",
            self.clip_grad_norm,
            "must be positive, or null for no clipping",
        )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"optim.{name}", beta, "must be in [0, 1)")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * steps_per_epoch))

    def total_warmup_steps(self, steps_per_epoch: int) -> int:
        """Steps of linear warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_epochs * steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """On how much, and how, a step is computed."""

    num_workers: int | tuple[int, int] = 1
    """Training workers; [min, max]: elastic; 0: this process alone, without Ray."""
    use_gpu: bool = False
    """One CUDA device per worker."""
    cpus_per_worker: int = 1
    """CPUs reserved per worker, for decoding and, without GPU, for the step itself."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the model; fsdp: parameters and optimizer state are sharded."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16: autocast with float32 weights; auto: bf16 on CUDA, float32 on CPU."""
    tf32: bool = True
    """TensorFloat-32 for the matrix products that stay in float32 on CUDA."""
    compile: bool = False
    """torch.compile the model."""
    accumulate_steps: int = 1
    """Micro-batches a worker's share of the global batch is split into."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more compute."""
    max_failures: int = 8
    """Restarts of the worker group before the run fails."""
    peak_tflops: float | None = None
    """Peak of one worker's device for MFU; null: known for common GPUs, else measured."""

    def __post_init__(self) -> None:
        low, high = self.worker_range
        require(
            0 <= low <= high and (low > 0 or high == 0),
            "scaling.num_workers",
            self.num_workers,
            "must be 0, a positive number or [min, max] with 1 <= min <= max",
        )
        one_of("scaling.strategy", self.strategy, ("ddp", "fsdp"))
        require(
            self.strategy == "ddp" or low > 0,
            "scaling.strategy",
            self.strategy,
            "sharding needs scaling.num_workers >= 1",
        )
        one_of("scaling.precision", self.precision, ("auto", "float32", "bf16"))
        at_least("scaling.accumulate_steps", self.accumulate_steps, 1)
        at_least("scaling.cpus_per_worker", self.cpus_per_worker, 1)
        at_least("scaling.max_failures", self.max_failures, 0)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        low, high = self.num_workers
        return low, high


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a killed run continues from."""

    every_steps: int = 1000
    """Steps between checkpoints; one is also made at the end."""
    keep: int = 3
    """Complete checkpoints kept; at least 2, so that a damaged one has a predecessor."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 1)
        at_least("checkpoint.keep", self.keep, 2)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is watched, and what happens: off, warn, stop, or rollback to the last checkpoint.

    A rollback skips the data between that checkpoint and the offence.
    """

    non_finite: Action = "rollback"
    """NaN or infinite loss or gradient. Such an update is never applied, whatever the action."""
    exploding_gradient: Action = "warn"
    """Gradient norm above gradient_ratio times its recent median."""
    gradient_ratio: float = 50.0
    """See exploding_gradient."""
    code_collapse: Action = "warn"
    """Predicted tokens use fewer than min_perplexity codes."""
    min_perplexity: float = 2.0
    """exp(entropy) of the predicted tokens of a logging period."""
    accuracy_floor: Action = "warn"
    """Masked-token accuracy no better than always guessing the most frequent token."""
    grace_steps: int = 1000
    """Steps, after warm-up, before collapse and floor are judged."""
    data_starvation: Action = "warn"
    """Waiting for data takes more than max_data_wait of a logging period; names the cause."""
    max_data_wait: float = 0.3
    """Share of wall-clock."""
    max_rollbacks: int = 3
    """Rollbacks before the run stops."""

    def __post_init__(self) -> None:
        for name in ("non_finite", "exploding_gradient", "code_collapse", "accuracy_floor"):
            value = getattr(self, name)
            one_of(f"health.{name}", value, ACTIONS)
        one_of("health.data_starvation", self.data_starvation, ("off", "warn", "stop"))
        require(
            self.gradient_ratio > 1, "health.gradient_ratio", self.gradient_ratio, "must be > 1"
        )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Looks at the features while training goes on; the order of samples is not touched."""

    images: str = ""
    """A labelled image table; empty: no probes."""
    every_steps: int = 10_000
    """Steps between probes; one is also made at the end."""
    max_images: int = 10_000
    """Images used, spread evenly over the table; a fifth of the table's groups is held out."""
    layer: int | None = None
    """Block whose features are probed, 1-based; null: three quarters of the depth."""

    def __post_init__(self) -> None:
        at_least("probe.every_steps", self.every_steps, 1)
        require(self.max_images > 1, "probe.max_images", self.max_images, "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked image modelling on visual tokens that a token table holds."""

    images: str
    """URI of the image table."""
    tokens: list[str]
    """URIs of one or more token tables of that image table; more tables add views."""
    output: str
    """URI of the run directory. The same one continues the run."""
    name: str = ""
    """Sub-directory of output for this run; empty: output itself."""
    tokenizer: str = ""
    """URI of the tokenizer, for pictures of decoded tokens only; empty: none are made."""
    seed: int = 0
    """Initial weights, order of samples, masks and stochastic depth follow from it."""
    log_every: int = 10
    """Steps between logs; the device is waited for only then."""
    pictures_every: int = 0
    """Steps between pictures of predictions in MLflow; 0: at the end only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        at_least("log_every", self.log_every, 1)
        at_least("pictures_every", self.pictures_every, 0)
        require(
            self.masking.num_masked <= self.model.num_patches,
            "masking.num_masked",
            self.masking.num_masked,
            f"must be at most the {self.model.num_patches} patches of an image",
        )
        most = self.scaling.worker_range[1]
        require(
            most <= self.data.num_shards,
            "data.num_shards",
            self.data.num_shards,
            f"must be at least the largest number of workers, {most}",
        )


# A function, not a method: the command-line parser takes the methods of a top-level configuration
# for sub-commands.
def run_uri(config: PretrainConfig) -> str:
    """Where the run lives. Raises InputError if no output is named."""
    require(bool(config.output), "output", config.output, "name the directory (or URI) of the run")
    base, question, query = config.output.partition("?")
    path = f"{base.rstrip('/')}/{config.name}" if config.name else base
    return path + question + query
