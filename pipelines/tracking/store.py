"""Which MLflow store a run goes to: its URI, its experiment, and where files are kept."""

import contextlib
import logging
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines import storage
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def absolute_tracking_uri(uri: str) -> str:
    """The tracking URI as every process understands it, whatever its working directory.

    Raises:
        InputError: it is a plain path or of an unknown kind.
    """
    if not uri:
        return f"sqlite:///{Path('mlflow.db').absolute()}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    scheme = urlsplit(uri).scheme
    if scheme.partition("+")[0] in ("http", "https", "postgresql", "mysql", "mssql", "databricks"):
        return uri
    raise InputError(
        f"tracking.uri: {uri!r} is no MLflow tracking URI; use http://server:5000, "
        f"sqlite:///{uri.rstrip('/') or '.'}/mlflow.db or leave it empty"
    )


def require_server(uri: str) -> None:
    """Waits a moment for the server. Raises InputError when nobody answers."""
    # MLflow itself would try for minutes before it says that nobody is there.
    for attempt in range(3):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
                return
        except urllib.error.HTTPError:
            return  # somebody is there; what it thinks of us, MLflow will say
        except (OSError, ValueError) as error:
            if attempt == 2:
                raise InputError(
                    f"tracking.uri: no answer from {uri} ({error}); start the MLflow server, or "
                    "leave tracking.uri empty for a local SQLite file, or pass "
                    "--tracking.enabled false"
                ) from error
            time.sleep(0.5 * (attempt + 1))


def experiment_id(client: "MlflowClient", config: TrackingConfig, tracking_uri: str) -> str:
    """The configured experiment, made where it is missing. Raises InputError if it is deleted."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                raise InputError(
                    f"tracking.experiment: {config.experiment!r} is deleted in {tracking_uri}; "
                    "restore it (mlflow experiments restore) or choose another name"
                )
            return str(experiment.experiment_id)
        location = artifact_location(config, tracking_uri)
        # Another driver may make it in the same moment.
        with contextlib.suppress(MlflowException):
            return str(client.create_experiment(config.experiment, artifact_location=location))
    raise InputError(f"tracking.experiment: {config.experiment!r} could not be made; choose a name")


def artifact_location(config: TrackingConfig, tracking_uri: str) -> str | None:
    """Where a new experiment keeps its files; None: the server decides. Raises InputError."""
    # Always explicit where no server decides: MLflow's default is the working directory of
    # whichever process comes first, which in a Ray worker is deleted with the session.
    directory = re.sub(r"[^\w.-]", "_", config.experiment)
    if config.artifact_uri:
        return storage.join(storage.absolute(config.artifact_uri), directory)
    if tracking_uri.startswith("sqlite:///"):
        parent = Path(tracking_uri.removeprefix("sqlite:///")).parent
        return str(parent / "mlartifacts" / directory)
    if tracking_uri.startswith(("http", "databricks")):
        return None
    raise InputError(
        "tracking.artifact_uri: '' with a database in tracking.uri; name a place that all "
        "machines reach, for example s3://bucket/mlflow"
    )


def reopened(client: "MlflowClient", run_id: str) -> str:
    """The run set running again; "" when the store does not have it any more."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("tracking: run %s is not in the store any more; a new one is made", run_id)
        return ""
    if run.info.lifecycle_stage != "active":
        log.warning("tracking: run %s was deleted; a new one is made", run_id)
        return ""
    client.update_run(run_id, status="RUNNING")
    return run_id
