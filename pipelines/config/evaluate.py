"""Configuration of the `evaluate` stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.config.checks import Ge, Gt, Le, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig

# What makes no other evaluation of it: where things are, and how it is computed.
MAY_CHANGE = ("run", "images", "output", "force", "lease", "tracking", "batch_size", "device")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Frozen features against labels: nearest neighbours and a linear probe."""

    run: str
    """Run directory of a pretraining, or a weights directory."""
    images: str
    """Labelled image table."""
    test_images: str = ""
    """Another labelled table to test on; empty: parts of `images` are held out in turn."""
    output: str = ""
    """Directory for evaluation.json and pictures; empty: evaluation/ in the run directory."""
    num_folds: Annotated[int, Ge(2)] = 5
    """Every group is tested once, by probes that were fitted on the other folds."""
    one_per_group: bool = True
    """Use the first image of every group only, so that near-duplicates (skin tones of one emoji)
    neither leak nor weigh more."""
    max_images: Annotated[int, Ge(0)] = 20_000
    """Images used, spread evenly over the table; 0: all."""
    pooling: Literal["mean", "cls", "grid"] = "mean"
    """Features of an image: mean of its patches; the cls token; or the means of a 4x4 grid of
    regions side by side, which keeps where things are, as raw pixels do."""
    layers: list[int] = field(default_factory=list)
    """Blocks to choose from, 1-based; empty: all."""
    knn_k: Annotated[int, Ge(1)] = 10
    """Neighbours that vote."""
    crop_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Side of the central square crop, as a share of the shorter side."""
    baselines: bool = True
    """Also evaluate the same network at random initialisation, and raw pixels."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Images per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    seed: int = 0
    """Folds and the random network follow from it."""
    force: bool = False
    """Evaluate again although the same evaluation is there."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        require(min(self.layers, default=1) >= 1, "layers", self.layers, "blocks count from 1")
