"""Which MLflow store a run goes to: its URI, its experiment, and where files are kept."""

import contextlib
import fcntl
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipelines import storage
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.redaction import redacted, redacted_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
SQLITE = "sqlite:///"


def quiet_mlflow() -> None:
    """Keeps the notes that MLflow writes about its own tables and requests off the terminal."""
    for name in ("mlflow", "alembic", "mlflow.store.db.utils", "mlflow.tracking", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def database_path(uri: str) -> Path:
    """The file of a sqlite URI, in which `%25` and `%3F` stand for percent and question mark."""
    return Path(unquote(uri.removeprefix(SQLITE)))


def absolute_tracking_uri(uri: str) -> str:
    """The tracking URI as every process understands it, whatever its working directory.

    Raises:
        InputError: it is a plain path or of an unknown kind.
    """
    if not uri or uri.startswith(SQLITE):
        path = str((database_path(uri) if uri else Path("mlflow.db")).absolute())
        return SQLITE + path.replace("%", "%25").replace("?", "%3F")
    scheme = urlsplit(uri).scheme
    if scheme.partition("+")[0] in ("http", "https", "postgresql", "mysql", "mssql", "databricks"):
        return uri
    raise InputError(
        f"tracking.uri: {redacted(uri)!r} is no MLflow tracking URI; use http://server:5000, "
        f"sqlite:///{redacted(uri).rstrip('/') or '.'}/mlflow.db or leave it empty"
    )


def address(server_uri: str) -> str:
    """A server's address as a link; its user is left out, for a browser asks who is there."""
    return re.sub(r"(?<=://)[^/@]*@", "", redacted(server_uri)).rstrip("/")


def connect(tracking_uri: str) -> "MlflowClient":
    """A client of a store that has answered, asked by MLflow itself: its settings for TLS, tokens
    and basic authentication hold.

    Raises:
        InputError: nobody answers, or the answer is a refusal.
    """
    if tracking_uri.startswith("http"):
        require_answer(tracking_uri)
    from mlflow import MlflowClient

    try:
        with _alone_with_file(tracking_uri), _without_stray_directory(tracking_uri):
            client = MlflowClient(tracking_uri)
            client.search_experiments(max_results=1)
    except Exception as error:
        reason = redacted_text(" ".join(str(error).split()))[:500]
        raise InputError(
            f"tracking.uri: {redacted(tracking_uri)!r} cannot be used ({reason}); name a running "
            "MLflow server or a writable sqlite:///file.db, or pass --tracking.enabled false"
        ) from error
    return client


def require_answer(uri: str) -> None:
    """Waits a moment for the server: MLflow itself would try for minutes. Raises InputError.

    Only asks whether somebody is there; whether it can be trusted, and what it thinks of us, is
    between it and MLflow.
    """
    import requests

    parts = urlsplit(uri)
    # Without the user: who answers is not known yet.
    health = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
    for attempt in range(3):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the certificate, which MLflow will check
                requests.get(
                    health,
                    timeout=10,
                    verify=False,  # noqa: S501
                    allow_redirects=False,
                    auth=lambda request: request,  # nothing of .netrc either
                )
        except requests.RequestException as error:
            if attempt == 2:
                raise InputError(
                    f"tracking.uri: no answer from {redacted(uri)} ({type(error).__name__}); start "
                    "the MLflow server, or leave tracking.uri empty for a local SQLite file, or "
                    "pass --tracking.enabled false"
                ) from error
            time.sleep(0.5 * (attempt + 1))
        else:
            return


@contextlib.contextmanager
def _alone_with_file(tracking_uri: str) -> Iterator[None]:
    """One process at a time, for a SQLite file: MLflow makes its tables when it first opens one,
    and of two that do so at once both fail."""
    if not tracking_uri.startswith(SQLITE):
        yield
        return
    path = database_path(tracking_uri)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _without_stray_directory(tracking_uri: str) -> Iterator[None]:
    """Takes away what MLflow makes for a SQLite file: the directory that the URI names before `%25`
    and `%3F` are read."""
    stray = Path(tracking_uri.removeprefix(SQLITE)).parent
    is_new = tracking_uri.startswith(SQLITE) and not stray.exists()
    yield
    if is_new:
        with contextlib.suppress(OSError):
            os.removedirs(stray)  # as far up as they are empty


def experiment_id(client: "MlflowClient", config: TrackingConfig, tracking_uri: str) -> str:
    """The configured experiment, made where it is missing. Raises InputError if it is deleted."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                raise InputError(
                    f"tracking.experiment: {config.experiment!r} is deleted in "
                    f"{redacted(tracking_uri)}; "
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
    if tracking_uri.startswith(SQLITE):
        parent = database_path(tracking_uri).parent
        place = parent / "mlartifacts" / directory
        # MLflow takes a percent sign in a path for an escape.
        return place.as_uri() if "%" in str(place) else str(place)
    if tracking_uri.startswith(("http", "databricks")):
        return None
    raise InputError(
        "tracking.artifact_uri: '' with a database in tracking.uri; name a place that all "
        "machines reach, for example s3://bucket/mlflow"
    )


def has_run(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store still has a run; says so where it has not."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("tracking: run %s is not in the store any more; a new one is made", run_id)
        return False
    if run.info.lifecycle_stage != "active":
        log.warning("tracking: run %s was deleted; a new one is made", run_id)
        return False
    return True
