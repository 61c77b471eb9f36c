"""A real MLflow store for tests, and how to read it."""

import shutil
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.config.tracking import TrackingConfig

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session", name="empty_store")
def empty_store_fixture(tmp_path_factory):
    """An SQLite store with MLflow's tables, made once: its migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(name="config")
def config_fixture(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")


def start(config, stage="tokenize", **options):
    return tracking.start_run(
        config, stage=stage, params=options.pop("params", {}), system_metrics=False, **options
    )


def dataset(name, digest, uri="/data/table"):
    return tracking.Dataset(name=name, uri=uri, digest=digest, context="training")


def steps(client, run, name):
    return [metric.step for metric in client.get_metric_history(run.run_id, name)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
