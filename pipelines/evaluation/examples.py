"""Examples of what frozen features find alike, as pictures: images, and patches within them."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from pipelines.config.evaluate import EvaluateConfig
from pipelines.evaluation.features import Weights, patch_reader, read_features
from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.protocol import Split
from pipelines.pictures.neighbours import nearest_neighbours, patch_similarity

QUERIES = 8
NEIGHBOURS = 7


def examples(
    config: EvaluateConfig,
    weights: Weights,
    data: LabelledImages,
    features: np.ndarray,
    split: Split,
    layer: int,
    device: str,
    where: str,
) -> Mapping[str, Image.Image]:
    """Nearest neighbours among the rows that the first split knows, and similar patches.

    `features` (n, d) are those after block `layer`; the images to show are spread evenly over the
    test rows, so that they are the same for all weights. `where` names the weights in titles.
    """
    spread = np.linspace(0, len(split.test) - 1, min(QUERIES, len(split.test)))
    queries = split.test[spread.round().astype(int)]
    found = nearest(features[queries], features[split.known], NEIGHBOURS)
    rows = np.concatenate([queries[:, None], split.known[found]], axis=1)
    wanted = np.unique(rows)
    size = weights.model.image_size[0]
    pixels = np.concatenate(
        list(data.pixels(size, positions=wanted, crop_fraction=config.crop_fraction))
    )
    reader = patch_reader(
        weights.model.to(device), layers=[layer], mean=weights.mean, std=weights.std
    )
    shown = pixels[np.searchsorted(wanted, queries)]
    [patches] = read_features({"own": reader}, [shown], len(shown), device=device)["own"]
    names = [[data.class_names[data.labels[row]] for row in line] for line in rows]
    note = f"features after block {layer}, {config.pooling} of patches"
    return {
        "neighbours": nearest_neighbours(
            pixels[np.searchsorted(wanted, rows)],
            names,
            title=f"Nearest neighbours · {where}",
            note=f"left: a test image; then the most similar known ones. Green: same class. {note}",
        ),
        "patch_similarity": patch_similarity(
            shown,
            patches,
            weights.model.grid_size,
            title=f"Patches like one patch · {where}",
            note=f"orange: the patch; blue: alike (cosine, less the image's mean). Block {layer}",
        ),
    }


def nearest(queries: np.ndarray, known: np.ndarray, count: int) -> np.ndarray:
    """Positions (len(queries), count) in `known` of the most similar rows (cosine)."""
    a, b = (torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (queries, known))
    found: np.ndarray = (a @ b.T).topk(min(count, len(b)), dim=1).indices.numpy()
    return found
