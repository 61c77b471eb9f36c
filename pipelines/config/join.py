"""Configuration of the `join` stage."""

from dataclasses import dataclass, field

from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Several image tables as one, without a copy of their images."""

    images: list[str]
    """URIs of the image tables, whose rows follow each other in this order."""
    output: str
    """URI of the joined image table."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
