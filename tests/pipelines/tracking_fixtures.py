"""A real MLflow store for tests, and how to read it."""

from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.config.tracking import TrackingConfig

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(name="config")
def config_fixture(mlflow_uri):
    return TrackingConfig(uri=mlflow_uri)


def start(config, stage="tokenize", **options):
    return tracking.start_run(
        config, stage=stage, params=options.pop("params", {}), system_metrics=False, **options
    )


def dataset(name, digest, uri="/data/table"):
    return tracking.Dataset(name=name, uri=uri, digest=digest, context="training")


def steps(client, run, name):
    return [metric.step for metric in client.get_metric_history(run.run_id, name)]
