"""Configuration of the `finetune` stage: every knob, its meaning and its limits."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from beit.view_policy import ViewPolicy
from pipelines.config import common
from pipelines.config.checks import Ge, Gt, Le, Lt, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.pretrain import CheckpointConfig, ScalingConfig
from pipelines.config.pretrain import OptimConfig as PretrainOptim
from pipelines.config.tracking import TrackingConfig

# What a resumed run may change, see `pipelines.config.pretrain.MAY_CHANGE`. `run`, `images` and
# `test` may move to another URI: their fingerprints are compared instead.
MAY_CHANGE = (
    "run",
    "images",
    "test",
    "testing.every_epochs",
    "testing.batch_size",
    *common.HOW,
)

# The views of supervised training: crops and flips; colours are RandAugment's.
SUPERVISED = ViewPolicy(min_area=0.08, brightness=0.0, contrast=0.0, saturation=0.0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is put around the encoder, whose own sizes are those of its weights."""

    image_size: Annotated[int | None, Ge(1)] = None
    """Side of the square view in pixels; positions are resized to it. null: as pretrained."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the head sees: the mean of the patch tokens after a norm of its own, or the class
    token after pretraining's norm."""
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    head: Literal["auto", "fresh"] = "auto"
    """fresh: always a new head; auto: the one there goes on if it is of the same classes."""
    encoder: Literal["pretrained", "random"] = "pretrained"
    """random: weights of the same sizes, drawn from `seed`: what the labels alone reach."""
    num_heads: Annotated[int | None, Ge(1)] = None
    """Attention heads of a unilm file without bias tables whose heads are not 64 wide."""

    def __post_init__(self) -> None:
        check(self, "model.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """RandAugment and random erasing; a pure function of (seed, image digest, epoch)."""

    num_operations: Annotated[int, Ge(0), Le(16)] = 2
    """Operations picked for a view, each applied with probability 0.5; 0: none."""
    magnitude: Annotated[float, Ge(0), Le(10)] = 9.0
    """How strong they are on average, 10 at most."""
    magnitude_std: Annotated[float, Ge(0)] = 0.5
    """Standard deviation of that."""
    erase_probability: Annotated[float, Ge(0), Le(1)] = 0.25
    """Chance that noise replaces a rectangle of a view."""

    def __post_init__(self) -> None:
        check(self, "augment.")


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup, CutMix and label smoothing; a pure function of (seed, step, canonical shard)."""

    mixup: Annotated[float, Ge(0)] = 0.8
    """Parameter of the beta distribution of mixup; 0: no mixup."""
    cutmix: Annotated[float, Ge(0)] = 1.0
    """The same of CutMix."""
    probability: Annotated[float, Ge(0), Le(1)] = 1.0
    """Chance that the images of a shard are mixed in a step."""
    switch_probability: Annotated[float, Ge(0), Le(1)] = 0.5
    """Chance of CutMix where both are on."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of every label that all classes divide."""

    def __post_init__(self) -> None:
        check(self, "mixing.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(common.DataConfig):
    """The order of samples, which no number of workers changes, and who decodes."""

    executor: Literal["threads", "ray_tasks"] = "threads"
    """Who decodes: threads of the training worker, or Ray tasks on any node of the cluster."""
    mean: tuple[float, float, float] | None = None
    """Pixels in [0, 1] are normalised by (x - mean) / std; null: as the weights were pretrained."""
    std: Annotated[tuple[float, float, float] | None, Gt(0)] = None
    """See mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.mean is None) == (self.std is None),
            "data.mean",
            self.mean,
            f"goes together with data.std = {self.std}; give both or neither",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(PretrainOptim):
    """AdamW and its schedule; the defaults are those of BEiT-Base on ImageNet-1k."""

    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.65
    """Learning rate of each layer, in units of that of the layer above."""


@dataclass(frozen=True, kw_only=True)
class TestingConfig:
    """How the test images are looked at; training does not depend on it."""

    every_epochs: Annotated[float, Gt(0)] = 1.0
    """Epochs between tests; one is also made at the end."""
    crop_fraction: Annotated[float | None, Gt(0), Le(1)] = None
    """Side of the central square; null: 224/256 below 384 pixels, else the whole side."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Images per pass and worker."""

    def __post_init__(self) -> None:
        check(self, "testing.")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A classifier from a pretrained network, on labelled images."""

    run: str
    """URI of what to begin with: a run of `pretrain` or `finetune`, a weights folder, or published
    weights: a transformers or timm folder, or a unilm file (.pth)."""
    images: str
    """URI of the image table to train on; every image has a label."""
    test: str = ""
    """URI of the image table to test on, with the same classes; empty: no tests."""
    output: str
    """URI of the run directory. The same one continues the run."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """The head, order of samples, views, augmentation, mixing and stochastic depth follow from it,
    the views together with policy.seed."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between logs; the device is waited for only then."""
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: ViewPolicy = field(default_factory=lambda: SUPERVISED)
    """The views, a new one each epoch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(global_batch_size=1024))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=100, warmup_epochs=20, lr=4e-3, min_lr=1e-6, clip_grad_norm=None
        )
    )
    testing: TestingConfig = field(default_factory=TestingConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: common.HealthConfig = field(default_factory=common.HealthConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        common.check_shards(self.data, self.scaling)
        mixes = self.mixing.mixup > 0 or self.mixing.cutmix > 0
        require(
            not mixes or self.data.global_batch_size >= 2 * self.data.num_shards,
            "data.num_shards",
            self.data.num_shards,
            "mixup and CutMix mix the images of a shard, and a step takes only one of each: give "
            f"at most half of data.global_batch_size = {self.data.global_batch_size}, or "
            "--mixing.mixup 0 --mixing.cutmix 0",
        )
