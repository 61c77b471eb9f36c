"""Configuration of the `pretrain` stage: every knob, its meaning and its limits."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from beit.view_policy import ViewPolicy
from pipelines.config import common
from pipelines.config.checks import Ge, Gt, Le, Lt, check, require
from pipelines.config.common import Action
from pipelines.config.lease import LeaseConfig
from pipelines.config.protocol import ProtocolConfig
from pipelines.config.tracking import TrackingConfig

# What a resumed run may change: how it is computed, watched and reported. Everything else decides
# what is computed, and a change to it asks for another run directory. `images`, `tokens`, `views`
# and `init` may move to another URI: their fingerprints are compared instead.
MAY_CHANGE = (
    "images",
    "tokens",
    "views",
    "tokenizer",
    "init",
    "name",
    "pictures_every",
    "probe",
    *common.HOW,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder; the defaults are BEiT-Base as released. The vocabulary is the token table's."""

    image_size: Annotated[int, Ge(1)] = 224
    """Side of the square patch view, in pixels."""
    patch_size: Annotated[int, Ge(1)] = 16
    """Side of a patch, in pixels; image_size / patch_size must give the token table's grid."""
    dim: Annotated[int, Ge(1)] = 768
    """Width of the encoder."""
    depth: Annotated[int, Ge(1)] = 12
    """Number of blocks."""
    num_heads: Annotated[int, Ge(1)] = 12
    """Attention heads; must divide dim."""
    mlp_ratio: Annotated[float, Gt(0)] = 4.0
    """Hidden width of the MLP, in units of dim."""
    absolute_positions: bool = False
    """Learned absolute position embeddings (the paper's plain model)."""
    relative_positions: Literal["none", "shared", "per_block"] = "shared"
    """Relative position bias: one table for all blocks (as released), one per block, or none."""
    layer_scale_init: float | None = 0.1
    """Initial layer scale (0.1 base, 1e-5 large); null: no layer scale."""
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        check(self, "model.")
        require(
            self.image_size % self.patch_size == 0,
            "model.image_size",
            self.image_size,
            f"must be a multiple of model.patch_size = {self.patch_size}",
        )
        require(
            self.dim % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide model.dim = {self.dim}",
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
class ObjectiveConfig:
    """What is predicted of what is hidden."""

    kind: Literal["beit", "beitv2", "mae"] = "beit"
    """beit: the tokens of masked patches; beitv2: those twice, also by patch aggregation; mae:
    their pixels, by an encoder that sees visible patches only (needs no tokens)."""
    early_layer: Annotated[int, Ge(1)] = 9
    """beitv2: block whose patch states are aggregated (9 of base's 12, 21 of large's 24)."""
    head_layers: Annotated[int, Ge(1)] = 2
    """beitv2: blocks of the aggregation head, which is dropped after pretraining."""
    decoder_dim: Annotated[int, Ge(1)] = 512
    """mae: width of the decoder, which is dropped after pretraining."""
    decoder_depth: Annotated[int, Ge(1)] = 8
    """mae: blocks of the decoder."""
    decoder_heads: Annotated[int, Ge(1)] = 16
    """mae: attention heads of the decoder; must divide decoder_dim."""
    normalise_pixels: bool = True
    """mae: predict the pixels of a patch less their mean, over their deviation."""

    def __post_init__(self) -> None:
        check(self, "objective.")
        require(
            self.decoder_dim % self.decoder_heads == 0,
            "objective.decoder_dim",
            self.decoder_dim,
            f"must be a multiple of objective.decoder_heads = {self.decoder_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which patches are hidden; a pure function of (seed, image digest, epoch)."""

    kind: Literal["blockwise", "random"] = "blockwise"
    """blockwise as in BEiT, or independent random patches."""
    num_masked: Annotated[int, Ge(1)] = 75
    """Patches hidden per image; at most that many for blockwise without `exact`."""
    min_block: int = 16
    """Smallest block, in patches (blockwise)."""
    max_block: int | None = None
    """Largest block; null: num_masked."""
    exact: bool = False
    """Exactly num_masked patches (BEiT v2) instead of at most (BEiT as coded)."""

    def __post_init__(self) -> None:
        check(self, "masking.")
        require(
            self.kind == "random" or 0 < self.min_block <= self.num_masked,
            "masking.min_block",
            self.min_block,
            f"must be between 1 and masking.num_masked = {self.num_masked}; "
            "larger blocks would leave most images without any masked patch",
        )
        require(
            self.max_block is None or self.min_block <= self.max_block,
            "masking.max_block",
            self.max_block,
            f"must be at least masking.min_block = {self.min_block}, or null",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(common.DataConfig):
    """The order of samples, which no number of workers changes, and who decodes."""

    executor: Literal["threads", "ray_tasks"] = "threads"
    """Who decodes: threads of the training worker, or Ray tasks on any node of the cluster."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Pixels in [0, 1] are normalised by (x - mean) / std; the default is ImageNet's."""
    std: Annotated[tuple[float, float, float], Gt(0)] = (0.229, 0.224, 0.225)
    """See mean."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(common.OptimConfig):
    """AdamW and its schedule; the defaults are those of BEiT on ImageNet-1k.

    Vectors, position and class tokens have no weight decay; of mae, vectors alone have none.
    """

    epochs: Annotated[float, Gt(0)] = 800.0
    """Length of the run in passes over the images; `steps` overrides it."""
    steps: Annotated[int | None, Ge(1)] = None
    """Length of the run in optimizer steps."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """Linear warm-up in epochs; `warmup_steps` overrides it."""
    warmup_steps: Annotated[int | None, Ge(0)] = None
    """Linear warm-up in steps."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay_end: Annotated[float | None, Ge(0)] = None
    """Weight decay that a cosine over the whole run goes to; null: it stays at weight_decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.weight_decay_end is None or self.weight_decay > 0,
            "optim.weight_decay_end",
            self.weight_decay_end,
            "a schedule begins above 0: raise optim.weight_decay, or leave this out",
        )

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
class ScalingConfig(common.ScalingConfig):
    """On how much, and how, a step is computed."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the model; fsdp: parameters and optimizer state are sharded."""
    tf32: bool = True
    """TensorFloat-32 for the matrix products that stay in float32 on CUDA."""
    accumulate_steps: Annotated[int, Ge(1)] = 1
    """Micro-batches a worker's share of the global batch is split into."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more compute."""
    peak_tflops: Annotated[float | None, Gt(0)] = None
    """Peak of one worker's device for MFU; null: by data sheets
    for common GPUs; for others there is no MFU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.strategy == "ddp" or self.worker_range[0] > 0,
            "scaling.strategy",
            self.strategy,
            "sharding needs scaling.num_workers >= 1",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(common.CheckpointConfig):
    """What a killed run continues from."""

    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.keep >= 2,
            "checkpoint.keep",
            self.keep,
            "must be at least 2, so that a damaged one has a predecessor",
        )


@dataclass(frozen=True, kw_only=True)
class HealthConfig(common.HealthConfig):
    """What is watched, and what happens: off, warn, stop, or rollback to the last checkpoint.

    A rollback skips the data between that checkpoint and the offence.
    """

    code_collapse: Action = "warn"
    """Predicted tokens use fewer than min_perplexity codes."""
    min_perplexity: Annotated[float, Ge(0)] = 2.0
    """exp(entropy) of the predicted tokens of a logging period."""
    accuracy_floor: Action = "warn"
    """Masked-token accuracy no better than always guessing the most frequent token."""
    grace_steps: Annotated[int, Ge(0)] = 1000
    """Steps, after warm-up, before collapse and floor are judged."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(ProtocolConfig):
    """Looks at the features while training goes on; the order of samples is not touched.

    With the values that `beit evaluate` has by default, figures are those that it gives.
    """

    images: str = ""
    """An image table, with labels for kNN and linear probe; empty: the one that is trained on."""
    tokens: list[str] = field(default_factory=list)
    """Token tables of `probe.images`, for the loss on images that are not trained on; empty: the
    fixed images whose loss is told are some that are trained on."""
    every_steps: Annotated[int, Ge(0)] = 500
    """Steps between probes, where time allows; at the end, too. 0: no probes."""
    max_share: Annotated[float, Gt(0), Le(1)] = 0.02
    """Of the time, which probes may take: one that would take more is left out."""

    def __post_init__(self) -> None:
        check(self, "probe.")
        require(
            min(self.layers, default=1) >= 1, "probe.layers", self.layers, "blocks count from 1"
        )
        require(
            bool(self.images) or not self.tokens, "probe.tokens", self.tokens, "name probe.images"
        )


# The views of MAE's paper: crops and flips.
CROPS = ViewPolicy(min_area=0.2, brightness=0.0, contrast=0.0, saturation=0.0)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked image modelling, on visual tokens that a token table holds or on pixels."""

    images: str = ""
    """URI of the image table; may be left out where `views` are given."""
    tokens: list[str] = field(default_factory=list)
    """URIs of one or more token tables of that image table; more tables add views. None for mae."""
    views: list[str] = field(default_factory=list)
    """URIs of view tables (`beit render`) of the same images and views, whose pixels are read in
    place of the images. None: images are decoded and rendered as training goes."""
    output: str
    """URI of the run directory. The same one continues the run."""
    name: str = ""
    """Sub-directory of output for this run; empty: output itself."""
    tokenizer: str = ""
    """URI of the tokenizer, for pictures of decoded tokens only; empty: tokens are shown as
    colours."""
    init: str = ""
    """URI of weights to begin with: a run, a weights folder, or published weights (see
    docs/pretrain.md); empty: from the seed."""
    seed: int = 0
    """Initial weights, order of samples, masks and stochastic depth follow from it."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between logs; the device is waited for only then."""
    pictures_every: Annotated[int, Ge(0)] = 0
    """Steps between pictures of predictions in MLflow; 0: at the end only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: ViewPolicy = field(default_factory=lambda: CROPS)
    """The views of mae, a new one each epoch or those of `views`; token tables bring their own."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        require(
            self.masking.num_masked <= self.model.num_patches,
            "masking.num_masked",
            self.masking.num_masked,
            f"must be at most the {self.model.num_patches} patches of an image",
        )
        require(
            self.objective.kind != "beitv2" or self.objective.early_layer < self.model.depth,
            "objective.early_layer",
            self.objective.early_layer,
            f"must be below model.depth = {self.model.depth}",
        )
        if self.objective.kind == "mae":
            _check_mae(self)
        else:
            require(
                self.policy == CROPS,
                "policy",
                self.policy,
                "token tables bring their own views (beit tokenize --policy...); leave it out",
            )
        require(
            bool(self.images or self.probe.images) or not (self.views and self.probe.every_steps),
            "probe.every_steps",
            self.probe.every_steps,
            "probes need images, and views stand for those; name images or probe.images, or give 0",
        )
        common.check_shards(self.data, self.scaling)


def _check_mae(config: PretrainConfig) -> None:
    model, masking = config.model, config.masking
    unfit = {
        "model.absolute_positions=true": not model.absolute_positions,
        "model.relative_positions=none": model.relative_positions != "none",
        "masking.kind=random": masking.kind != "random" and not masking.exact,
    }
    flags = " ".join(f"--{flag}" for flag, missing in unfit.items() if missing)
    require(
        not flags,
        "objective.kind",
        "mae",
        "its encoder sees visible patches only, as many in each image, at fixed positions; "
        f"give {flags} (jobs/configs/mae_base_in1k.yaml is the paper's recipe)",
    )
    for name, dim in (
        ("model.dim", model.dim),
        ("objective.decoder_dim", config.objective.decoder_dim),
    ):
        require(dim % 4 == 0, name, dim, "mae's positions need a multiple of 4")


# A function, not a method: the command-line parser takes the methods of a top-level configuration
# for sub-commands.
def run_uri(config: PretrainConfig) -> str:
    """Where the run lives. Raises InputError if no output is named."""
    require(bool(config.output), "output", config.output, "name the directory (or URI) of the run")
    base, question, query = config.output.partition("?")
    path = f"{base.rstrip('/')}/{config.name}" if config.name else base
    return path + question + query
