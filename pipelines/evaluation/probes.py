"""What frozen features know: nearest neighbours, a linear probe, and honest error bars.

Pure functions of arrays: features float (n, d), labels int (n,). Nothing draws from a global
generator, so the same features give the same figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_DECAYS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Tried from strong to weak, each starting from the one before."""
TRIAL_WEIGHT_DECAY = 0.03
"""With which blocks are compared before the weight decay is chosen for the best of them."""
CHUNK = 2048


def knn_predict(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    *,
    num_classes: int,
    k: int = 10,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classes (n,) by the k most similar training rows (cosine), each with weight exp(s / t)."""
    train, test = F.normalize(_features(train_x), dim=1), F.normalize(_features(test_x), dim=1)
    labels = _labels(train_y)
    k = min(k, len(train))
    found = []
    for start in range(0, len(test), CHUNK):
        similarity, neighbour = (test[start : start + CHUNK] @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(similarity), num_classes)
        # Similarities are at most 1: the shift keeps the exponential from overflowing.
        votes.scatter_add_(1, labels[neighbour], torch.exp((similarity - 1) / temperature))
        found.append(votes.argmax(1))
    return torch.cat(found).numpy() if found else np.zeros(0, np.int64)


def knn_accuracy(train_x: Any, train_y: Any, test_x: Any, test_y: Any, k: int = 10) -> float:
    """Share of test rows that `knn_predict` classifies right."""
    truth = np.asarray(test_y)
    num_classes = 1 + int(max(np.asarray(train_y).max(), truth.max()))
    found = knn_predict(train_x, train_y, test_x, num_classes=num_classes, k=k)
    return float((found == truth).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on standardised features."""

    weight: Tensor
    """(d, classes), for standardised features."""
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def predict(self, x: Any) -> np.ndarray:
        """Classes (n,)."""
        logits = ((_features(x) - self.mean) / self.scale) @ self.weight + self.bias
        found: np.ndarray = logits.argmax(1).numpy()
        return found


def fit_linear(
    x: Any, y: Any, *, num_classes: int, weight_decay: float, max_iterations: int = 40
) -> LinearProbe:
    """Minimises mean cross-entropy + weight_decay / 2 * |W|^2 by L-BFGS, from zero.

    With more features than rows the solution lies in the span of the rows, and is searched for
    there.
    """
    problem = _Problem(_features(x), num_classes=num_classes)
    rows = problem.rows(_features(x))
    return problem.probe(
        _solve(rows, _labels(y), problem.start(), weight_decay, max_iterations=max_iterations)
    )


class _Problem:
    # Standardised features, in a basis of their span where that is smaller than the features.

    def __init__(self, features: Tensor, *, num_classes: int) -> None:
        self.num_classes = num_classes
        self.mean = features.mean(0)
        scale = features.std(0, correction=0)
        # Features that (nearly) never change must not be blown up.
        self.scale = scale.clamp(min=1e-3 * float(scale.max())) + 1e-12
        self.basis: Tensor | None = None
        if features.shape[1] > features.shape[0]:
            self.basis = _span((features - self.mean) / self.scale)

    def rows(self, features: Tensor) -> Tensor:
        standardised = (features - self.mean) / self.scale
        return standardised if self.basis is None else standardised @ self.basis

    def start(self) -> tuple[Tensor, Tensor]:
        dim = len(self.mean) if self.basis is None else self.basis.shape[1]
        return torch.zeros(dim, self.num_classes), torch.zeros(self.num_classes)

    def probe(self, solution: tuple[Tensor, Tensor]) -> LinearProbe:
        weight, bias = solution
        full = weight if self.basis is None else self.basis @ weight
        return LinearProbe(weight=full, bias=bias, mean=self.mean, scale=self.scale)


def _solve(
    rows: Tensor,
    labels: Tensor,
    start: tuple[Tensor, Tensor],
    weight_decay: float,
    *,
    max_iterations: int = 40,
) -> tuple[Tensor, Tensor]:
    # The problem is convex: the start decides about the time only.
    weight, bias = (value.clone().requires_grad_() for value in start)
    with torch.enable_grad():
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(rows @ weight + bias, labels)
            loss = loss + 0.5 * weight_decay * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def linear_accuracy(
    train_x: Any, train_y: Any, test_x: Any, test_y: Any, weight_decay: float = TRIAL_WEIGHT_DECAY
) -> float:
    """Share of test rows that a linear probe of the training rows classifies right."""
    truth = np.asarray(test_y)
    num_classes = 1 + int(max(np.asarray(train_y).max(), truth.max()))
    probe = fit_linear(train_x, train_y, num_classes=num_classes, weight_decay=weight_decay)
    return float((probe.predict(test_x) == truth).mean())


def chosen_linear(
    layers: Sequence[Any],
    y: Any,
    train: np.ndarray,
    validation: np.ndarray,
    *,
    num_classes: int,
) -> tuple[LinearProbe, int, float, list[float]]:
    """The linear probe of the best layer with the best weight decay, both by validation rows.

    Args:
        layers: features (n, d) of the same rows after different blocks.
        y: classes (n,).
        train: row numbers to fit on.
        validation: row numbers to choose by; the final probe is fitted on both.
        num_classes: number of classes.

    Returns:
        probe, position in `layers`, weight decay, validation accuracy of every layer.
    """
    labels = _labels(y)
    rows = np.concatenate([train, validation])
    by_layer, best_problem, best_rows = [], None, None
    for x in layers:
        # Mean and scale come from the rows to fit on and to choose by, never from test rows.
        problem = _Problem(_features(x[rows]), num_classes=num_classes)
        reduced = problem.rows(_features(x[rows]))
        fitted, held = reduced[: len(train)], reduced[len(train) :]
        solution = _solve(fitted, labels[train], problem.start(), TRIAL_WEIGHT_DECAY)
        by_layer.append(_accuracy(held, labels[validation], solution))
        if by_layer[-1] == max(by_layer):
            best_problem, best_rows = problem, reduced
    layer = int(len(by_layer) - 1 - np.argmax(by_layer[::-1]))
    assert best_problem is not None
    assert best_rows is not None
    fitted, held = best_rows[: len(train)], best_rows[len(train) :]
    best, best_decay, solution = -1.0, TRIAL_WEIGHT_DECAY, best_problem.start()
    for decay in WEIGHT_DECAYS:
        solution = _solve(fitted, labels[train], solution, decay)
        accuracy = _accuracy(held, labels[validation], solution)
        if accuracy > best:
            best, best_decay = accuracy, decay
    final = _solve(best_rows, labels[rows], solution, best_decay)
    return best_problem.probe(final), layer, best_decay, by_layer


def _accuracy(rows: Tensor, labels: Tensor, solution: tuple[Tensor, Tensor]) -> float:
    weight, bias = solution
    return float(((rows @ weight + bias).argmax(1) == labels).float().mean())


def grouped_folds(groups: Sequence[str], num_folds: int, *, seed: int) -> np.ndarray:
    """Fold (n,) of every row: groups are dealt out at random and never divided.

    Folds differ by at most one group in the number of groups.
    """
    names, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % num_folds
    result: np.ndarray = fold[index]
    return result


def accuracy_interval(
    correct: np.ndarray, groups: Sequence[str], *, seed: int, num_draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean of `correct` (n,), by drawing whole groups with replacement.

    Rows of one group are near-duplicates; drawing them one by one would promise too much. Takes
    differences of two `correct` too: then it is the paired interval.
    """
    _, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    total = np.bincount(index, weights=np.asarray(correct, dtype=np.float64))
    size = np.bincount(index).astype(np.float64)
    generator = np.random.default_rng([seed, 2])
    means = np.empty(num_draws)
    for draw in range(num_draws):
        chosen = generator.integers(0, len(size), len(size))
        means[draw] = total[chosen].sum() / size[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share of which `hits` of `total` were seen, drawn independently.

    Wilson's score interval (1927): sensible at 0 and 1, too, unlike the normal one.
    """
    z = 1.959963984540054
    share, shrink = hits / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At its ends the interval closes exactly, whatever rounding makes of it.
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == total else centre + half


def _features(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float32)


def _labels(y: Any) -> Tensor:
    return torch.as_tensor(y).detach().to("cpu", torch.int64)


def _span(rows: Tensor) -> Tensor:
    # Orthonormal columns (d, r) that span the rows, from the small Gram matrix.
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-6 * values[-1].clamp(min=1e-12)
    basis: Tensor = rows.T @ (vectors[:, kept] / values[kept].sqrt())
    return basis
