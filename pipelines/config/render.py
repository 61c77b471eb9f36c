"""Configuration of the `render` stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from beit.view_policy import ViewPolicy
from pipelines.config.checks import Ge, Gt, check
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """Renders several views of every image, once and for all: training then decodes no image."""

    images: str
    """URI of the image table."""
    output: str
    """URI of the view table; the same command again goes on with an unfinished one."""
    num_views: Annotated[int, Ge(1)] = 4
    """Views of every image: as many as the token tables have that are trained on."""
    first_view: Annotated[int, Ge(0)] = 0
    """Index of the first view. Views added later: this is where the earlier table ended."""
    policy: ViewPolicy = field(default_factory=ViewPolicy)
    """As in `tokenize`."""
    image_size: Annotated[int, Ge(1)] = 224
    """Side of a view in pixels: `model.image_size` of the training."""
    form: Literal["lossless", "jpeg95", "jpeg90"] = "lossless"
    """lossless: the exact pixels, 98 kB a view of 224 pixels; jpeg95: JPEGs of quality 95 without
    chroma subsampling, 24 kB, 1.1 grey levels off on average; jpeg90: of quality 90 with 4:2:0,
    13 kB, 2.0 levels off."""
    rows_per_unit: Annotated[int, Ge(1)] = 256
    """Images in one unit of work (one file). Units end where row groups do, and may have fewer."""
    task_cpus: Annotated[float, Gt(0)] = 1
    """CPUs that one task is counted as; it uses one thread."""
    max_rejected_units: Annotated[int, Ge(0)] = 0
    """Units that may stay without views. More of them fail the stage."""
    retry_rejected: bool = False
    """Try units again that an earlier run gave up."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
