"""Configuration of the `lineage` stage."""

from dataclasses import dataclass, field

from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class LineageConfig:
    """Whose origin and use is asked for."""

    artefact: str
    """An MLflow run's id, a model (models:/NAME/VERSION, models:/ID), or the directory of a run, of
    weights, of a tokenizer or of a table; may stand without the flag."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """The store that is asked."""
