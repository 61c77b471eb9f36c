"""How frozen features are judged: what `evaluate` and the probes of a pretraining share."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.config.checks import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The probe protocol. Equal values, images and weights give equal figures wherever it runs."""

    max_images: Annotated[int, Ge(0)] = 10_000
    """Images used, spread evenly over the table; 0: all."""
    one_per_group: bool = True
    """Use the first image of every group only, so that near-duplicates (skin tones of one emoji)
    neither leak nor weigh more."""
    num_folds: Annotated[int, Ge(2)] = 5
    """Every group is tested once, by probes that were fitted on the other folds."""
    pooling: Literal["mean", "cls", "grid"] = "mean"
    """Features of an image: mean of its patches; the cls token; or the means of a 4x4 grid of
    regions side by side, which keeps where things are, as raw pixels do."""
    layers: list[int] = field(default_factory=list)
    """Blocks to choose from, 1-based; empty: all."""
    knn_k: Annotated[int, Ge(1)] = 10
    """Neighbours that vote."""
    crop_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Side of the central square crop, as a share of the shorter side."""
    seed: int = 0
    """Folds, initial values and the random network follow from it."""
