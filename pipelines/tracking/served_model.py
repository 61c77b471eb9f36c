"""The model that MLflow builds from this file: pixels in, frozen features or classes out.

MLflow runs this file by itself, with the package `beit` beside it; nothing here may import
another module of `pipelines`.
"""

from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from beit.classifier import BeitClassifier
from beit.weights import load_weights, read_weights_config


class FeatureModel(PythonModel):
    """What a network says of uint8 images (B, H, W, 3) of its size.

    The mean patch features of the last block; of a classifier, the probabilities of its classes.
    """

    def load_context(self, context: Any) -> None:
        directory = context.artifacts["weights"]
        self.model = load_weights(directory).eval()
        extra = read_weights_config(directory)["extra"]
        self.mean = torch.tensor(extra["pixel_mean"]).view(3, 1, 1)
        self.std = torch.tensor(extra["pixel_std"]).view(3, 1, 1)

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow passes it by name
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Features (B, dim) after the final norm, or probabilities (B, classes) in the order of
        `class_names` in the weights' config.json; with `params={"layer": k}` features after
        block k."""
        pixels = torch.from_numpy(np.ascontiguousarray(model_input)).permute(0, 3, 1, 2)
        layer = (params or {}).get("layer") or None
        with torch.inference_mode():
            normalised = (pixels.float() / 255 - self.mean) / self.std
            if layer is None and isinstance(self.model, BeitClassifier):
                said = self.model(normalised).softmax(dim=1)
            else:
                said = self.model.features(normalised, layer=layer)[:, 1:].mean(1)
        result: np.ndarray = said.numpy()
        return result


mlflow.models.set_model(FeatureModel())
