"""Weights as MLflow models: safetensors and code, no pickle.

The model is logged "from code": MLflow runs `served_model.py` to build it, with the package `beit`
beside it, so that `mlflow.pyfunc.load_model` works where only torch and MLflow are installed.
"""

import importlib.metadata
import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from beit.foreign import write_huggingface
from beit.weights import load_weights, read_weights_config
from pipelines import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)

REQUIREMENTS = ("torch", "numpy", "pillow", "safetensors")
MODEL_NAME = "weights"


def log_weights(
    client: "MlflowClient",
    run_id: str,
    weights_uri: str,
    *,
    registered_model_name: str = "",
) -> str:
    """Stores a weights directory as a model of a run, and registers it on request; each once.

    Nothing of MLflow's process-wide state (active run, tracking URI) is touched.

    Args:
        client: client of the store that holds the run.
        run_id: the run that made the weights.
        weights_uri: directory with `weights.safetensors` and `config.json`.
        registered_model_name: name in the model registry; a new version is made.

    Returns:
        the model's id; `models:/ID` is its URI for `mlflow.pyfunc.load_model`.
    """
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if outputs is not None and outputs.model_outputs:
        model = client.get_logged_model(outputs.model_outputs[0].model_id)
    else:
        model = _store(client, run_id, weights_uri)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if registered_model_name:
        _register(client, run_id, model.model_id, model.artifact_location, registered_model_name)
    return str(model.model_id)


def _store(client: "MlflowClient", run_id: str, weights_uri: str) -> "LoggedModel":
    import mlflow.pyfunc

    import beit

    packages = [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory, "weights")
        storage.fetch_dir(weights_uri, weights)
        target = Path(directory, "model")
        with warnings.catch_warnings():
            # MLflow would like an example input; the signature says all there is to say.
            warnings.simplefilter("ignore")
            mlflow.pyfunc.save_model(
                str(target),
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={"weights": str(weights), **_for_transformers(weights, directory)},
                code_paths=[str(Path(beit.__file__).parent)],
                pip_requirements=packages,
                signature=_signature(weights),
            )
        experiment_id = client.get_run(run_id).info.experiment_id
        model = _unfinished(client, experiment_id, run_id) or client.create_logged_model(
            experiment_id, name=MODEL_NAME, source_run_id=run_id
        )
        client.log_model_artifacts(model.model_id, str(target))
        return client.finalize_logged_model(model.model_id, "READY")


def _unfinished(client: "MlflowClient", experiment_id: str, run_id: str) -> "LoggedModel | None":
    """What an earlier try made for this run whose files were refused."""
    condition = f"source_run_id = '{run_id}' AND name = '{MODEL_NAME}'"
    found = client.search_logged_models([experiment_id], condition, max_results=1)
    return found[0] if found else None


def _for_transformers(weights: Path, directory: str) -> dict[str, str]:
    """The same weights as a folder that `transformers` loads without this package, if it can."""
    network, extra = load_weights(weights), read_weights_config(weights).get("extra") or {}
    folder = Path(directory, "huggingface")
    options = {"mean": extra["pixel_mean"], "std": extra["pixel_std"]}
    try:
        write_huggingface(network, folder, class_names=extra.get("class_names", ()), **options)
    except ValueError as error:
        log.warning("tracking: the model has no folder for transformers: %s", error)
        return {}
    return {"huggingface": str(folder)}


def _signature(weights: Path) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    config = read_weights_config(weights)["model"]
    images = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))
    said = config.get("num_classes") or config["dim"]
    outputs = TensorSpec(np.dtype(np.float32), (-1, said))
    # MLflow hands on only the parameters that the signature names.
    layer = ParamSpec("layer", "long", 0)
    return ModelSignature(
        inputs=Schema([images]), outputs=Schema([outputs]), params=ParamSchema([layer])
    )


def _register(
    client: "MlflowClient", run_id: str, model_id: str, source: str, model_name: str
) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if client.search_model_versions(f"name = '{model_name}' AND run_id = '{run_id}'"):
        return
    client.create_model_version(model_name, source=source, run_id=run_id, model_id=model_id)
