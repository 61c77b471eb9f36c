"""Options of the MLflow tracking that every stage shares."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a stage's run is recorded."""

    uri: str = ""
    """MLflow tracking URI: http(s)://server, or sqlite:///file.db. Empty: mlflow.db in the
    working directory, which needs no server."""
    experiment: str = "beit"
    """MLflow experiment; made when it does not exist."""
    run_name: str = ""
    """Name of the run. Empty: what tells it from others of its stage."""
    registered_model: str = ""
    """Name under which `pretrain` and `finetune` register their weights as a model. Empty: they are
    stored with the run only."""
    enabled: bool = True
    """False: nothing is recorded and MLflow is not imported."""
    job_id: str = ""
    """Identifier that the scheduler gave to the job. Set by `beit submit` and under Slurm."""
    artifact_uri: str = ""
    """Where the pictures and files of a new experiment go. Empty: decided by the server, or
    mlartifacts/ beside the SQLite file."""
