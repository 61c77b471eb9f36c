"""Configuration of the `report` stage."""

from dataclasses import dataclass, field
from typing import Annotated

from pipelines.config.checks import Ge, check
from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs are put side by side, and where."""

    runs: list[str] = field(default_factory=list)
    """Run directories, ids of MLflow runs, `experiment:NAME`, or a query in MLflow's words, such as
    "tags.`beit.stage` = 'pretrain' and params.seed = '0'"; may stand without the flag. The first
    run is what the others are compared with."""
    output: str = "report.html"
    """The file that is written."""
    metrics: list[str] = field(
        default_factory=lambda: ["loss", "mim_accuracy", "probe/linear_accuracy", "test/accuracy"]
    )
    """Curves that are drawn, where runs have them. The first is one whose small values are good."""
    max_runs: Annotated[int, Ge(1)] = 200
    """More runs than these are refused."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """The store that is asked and that gets the report."""

    def __post_init__(self) -> None:
        check(self)
