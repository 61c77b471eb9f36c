"""The model that MLflow builds from this file: pixels in, frozen features or classes out.

MLflow runs this file by itself, with the package `beit` beside it; nothing here may import
another module of `pipelines`.
"""

from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc import PythonModel
from PIL import Image

from beit.classifier import BeitClassifier
from beit.views import center_view, render
from beit.weights import load_weights, read_weights_config


class FeatureModel(PythonModel):
    """What a network says of uint8 images (B, H, W, 3) of any size.

    Of images that are not of its size it sees the central square, resized as for evaluations.
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
        fitted = np.stack([_fitted(image, self.model.image_size) for image in model_input])
        pixels = torch.from_numpy(fitted).permute(0, 3, 1, 2)
        layer = (params or {}).get("layer") or None
        with torch.inference_mode():
            normalised = (pixels.float() / 255 - self.mean) / self.std
            if layer is None and isinstance(self.model, BeitClassifier):
                said = self.model(normalised).softmax(dim=1)
            else:
                said = self.model.features(normalised, layer=layer)[:, 1:].mean(1)
        result: np.ndarray = said.numpy()
        return result


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    if size[0] != size[1]:
        raise ValueError(f"images of {(height, width)}: this network's are {size}; resize them")
    whole = Image.fromarray(np.ascontiguousarray(image))
    return render(whole, center_view(height, width, 1.0), size[0], "bicubic")


mlflow.models.set_model(FeatureModel())
