"""The probe protocol: one way from features and labels to figures, in training and in `evaluate`.

Groups of near-duplicates are never divided between fitting and testing; the block, the weight
decay and everything else that is chosen is chosen on rows that no test counts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipelines.config.protocol import ProtocolConfig
from pipelines.errors import InputError
from pipelines.evaluation.features import exact_products
from pipelines.evaluation.probes import (
    Device,
    accuracy_interval,
    chosen_linear,
    grouped_folds,
    knn_predict,
)
from pipelines.evaluation.result import Score

VALIDATION_FOLDS = 5
MOST_VALIDATION = 20_000
SIDE_BY_SIDE = 2**22
"""Entries of the features (n, d) of a small probe, or of their span (n, n): see `fits_at_once`."""

Probe = Literal["linear", "knn"]
PROBES: tuple[Probe, ...] = ("linear", "knn")
Fitted = tuple[np.ndarray, int, list[float]]
"""Classes of a split's test rows, the block chosen, validation accuracy of each block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row numbers: what probes are fitted on, what their choices are made by, what they are
    tested on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """All that a probe may see."""
        return np.concatenate([self.train, self.validation])

    def without(self, rows: Sequence[int]) -> "Split":
        """Less some rows."""
        left = (each[~np.isin(each, rows)] for each in (self.train, self.validation, self.test))
        return Split(**dict(zip(("train", "validation", "test"), left, strict=True)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a probe made of the test rows of all splits, one split after the other."""

    predicted: np.ndarray
    """int64 (n,): classes."""
    layers: list[int]
    """Position of the block that each split chose."""
    by_layer: np.ndarray
    """float (splits, L): validation accuracy of each block."""


def splits_of(protocol: ProtocolConfig, groups: Sequence[str], num_test: int = 0) -> list[Split]:
    """Folds of groups, each tested once; or one split whose test rows are the last `num_test`."""
    rows = np.arange(len(groups))
    if num_test:
        return [_split(rows[:-num_test], rows[-num_test:], groups, protocol.seed)]
    fold = grouped_folds(groups, protocol.num_folds, seed=protocol.seed)
    return [
        _split(rows[fold != number], rows[fold == number], groups, protocol.seed)
        for number in range(protocol.num_folds)
    ]


def _split(rest: np.ndarray, test: np.ndarray, groups: Sequence[str], seed: int) -> Split:
    # A fifth to choose by, of very many images fewer.
    shares = max(VALIDATION_FOLDS, len(rest) // MOST_VALIDATION)
    validation = grouped_folds([groups[row] for row in rest], shares, seed=seed + 1) == 0
    return Split(train=rest[~validation], validation=rest[validation], test=test)


def probe(
    kind: Probe,
    protocol: ProtocolConfig,
    features: np.ndarray,
    labels: np.ndarray,
    splits: Sequence[Split],
    *,
    device: Device = "cpu",
) -> Found:
    """Fits, chooses and tests on features (L, n, d) of blocks and labels (n,)."""
    num_classes = int(labels.max()) + 1
    _, count, dim = features.shape

    def fit(split: Split) -> Fitted:
        if kind == "linear":
            fitted, layer, _, validated = chosen_linear(
                list(features), labels, split.train, split.validation,
                num_classes=num_classes, device=device,
            )  # fmt: skip
            return fitted.predict(features[layer][split.test]), layer, validated
        layer, validated = _knn_layer(protocol, features, labels, split, device)
        x, known = features[layer], split.known
        return knn_predict(
            x[known], labels[known], x[split.test],
            num_classes=num_classes, k=protocol.knn_k, device=device,
        ), layer, validated  # fmt: skip

    num_fits = fits_at_once(count, dim, len(splits), device)
    with exact_products():
        found = _side_by_side(fit, splits, num_fits) if num_fits else list(map(fit, splits))
    predicted, layers, by_layer = zip(*found, strict=True)
    return Found(
        predicted=np.concatenate(predicted), layers=list(layers), by_layer=np.array(by_layer)
    )


def fits_at_once(count: int, dim: int, num_splits: int, device: Device) -> int:
    """How many splits are fitted at the same time, each on one core; 0: one by one, on all cores.

    On a CPU products of a small probe gain little from a second core, lose much on a busy machine,
    where cores wait for each other, and then what is found depends on the number of cores.
    """
    small = torch.device(device).type == "cpu" and count * min(count, dim) <= SIDE_BY_SIDE
    return min(torch.get_num_threads(), num_splits) if small else 0


def _side_by_side(
    fit: Callable[[Split], Fitted], splits: Sequence[Split], num_fits: int
) -> list[Fitted]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_fits) as pool:
            return list(pool.map(fit, splits))
    finally:
        torch.set_num_threads(threads)


def _knn_layer(
    protocol: ProtocolConfig, features: np.ndarray, labels: np.ndarray, split: Split, device: Device
) -> tuple[int, list[float]]:
    by_layer = []
    for x in features:
        found = knn_predict(
            x[split.train], labels[split.train], x[split.validation],
            num_classes=int(labels.max()) + 1, k=protocol.knn_k, device=device,
        )  # fmt: skip
        by_layer.append(float((found == labels[split.validation]).mean()))
    return int(np.argmax(by_layer)), by_layer


def score(
    found: Found,
    labels: np.ndarray,
    groups: Sequence[str],
    splits: Sequence[Split],
    *,
    layers: Sequence[int],
    seed: int,
) -> tuple[Score, np.ndarray]:
    """Accuracy over all test rows with its interval over groups, and which rows were right."""
    tested = np.concatenate([split.test for split in splits])
    truth = labels[tested]
    hits = found.predicted == truth
    low, high = accuracy_interval(hits, [groups[row] for row in tested], seed=seed)
    classes = range(int(labels.max()) + 1)
    errors = found.by_layer.std(axis=0, ddof=1) / len(splits) ** 0.5 if len(splits) > 1 else []
    return Score(
        accuracy=float(hits.mean()),
        low=low,
        high=high,
        class_accuracy=[
            float(hits[truth == c].mean()) if (truth == c).any() else None for c in classes
        ],
        layers=[layers[position] for position in found.layers],
        layer_accuracy=found.by_layer.mean(axis=0).tolist(),
        layer_errors=list(map(float, errors)),
    ), hits


def candidate_layers(protocol: ProtocolConfig, depth: int) -> list[int]:
    """The blocks to choose from."""
    return protocol.layers or list(range(1, depth + 1))


def check_layers(protocol: ProtocolConfig, depth: int, network: str) -> list[int]:
    """The blocks to choose from, of a network that has `depth`.

    Raises:
        InputError: it has fewer; names `network`.
    """
    layers = candidate_layers(protocol, depth)
    if max(layers) > depth:
        raise InputError(f"layers = {layers}: {network} has {depth} blocks")
    return layers
