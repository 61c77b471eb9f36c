"""Configuration of the `sync` stage."""

from dataclasses import dataclass, field

from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What MLflow is to be filled from."""

    runs: list[str] = field(default_factory=list)
    """Run directories, or outputs of other stages whose record could not be sent; may stand without
    the flag."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where they are recorded. An empty uri: where each was meant to be."""
