"""What frozen features know: nearest neighbours, a linear probe, RankMe, and honest error bars.

Pure functions of arrays: features float (n, d), labels int (n,). Nothing draws from a global
generator, so the same features give the same figures.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Device = str | torch.device

WEIGHT_DECAYS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Tried from strong to weak, each starting from the one before."""
TRIAL_WEIGHT_DECAY = 0.03
"""With which blocks are compared before the weight decay is chosen for the best of them."""
KNN_TEMPERATURE = 0.07
CUBIC_ROWS, KNN_ROWS = 512, 256
"""Sizes that the time of larger ones is reckoned from."""
CHUNK = 2**26
"""Entries of a matrix of similarities or logits that is held at a time (256 MB)."""


@torch.no_grad()
def knn_predict(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    *,
    num_classes: int,
    k: int = 10,
    device: Device = "cpu",
) -> np.ndarray:
    """Classes (n,) by the k most similar training rows (cosine), each with weight exp(s / t); t is
    KNN_TEMPERATURE."""
    train, test = (F.normalize(_features(x, device), dim=1) for x in (train_x, test_x))
    labels = _labels(train_y, device)
    k = min(k, len(train))
    found = []
    for part in _parts(len(test), len(train)):
        similarity, neighbour = (test[part] @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(similarity), num_classes, device=device)
        # Similarities are at most 1: the shift keeps the exponential from overflowing.
        votes.scatter_add_(1, labels[neighbour], torch.exp((similarity - 1) / KNN_TEMPERATURE))
        found.append(votes.argmax(1))
    return torch.cat(found).cpu().numpy() if found else np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on standardised features."""

    weight: Tensor
    """(d, classes), for standardised features."""
    bias: Tensor
    mean: Tensor
    scale: Tensor

    @torch.no_grad()
    def predict(self, x: Any) -> np.ndarray:
        """Classes (n,)."""
        rows = (_features(x, self.weight.device) - self.mean) / self.scale
        found = [
            (rows[part] @ self.weight + self.bias).argmax(1)
            for part in _parts(len(rows), len(self.bias))
        ]
        return torch.cat(found).cpu().numpy() if found else np.zeros(0, np.int64)


class _Problem:
    # Standardised features; of more features than rows in a basis of the rows' span, in which the
    # solution lies.

    def __init__(self, x: Any, *, num_classes: int, device: Device) -> None:
        self.num_classes = num_classes
        rows = _features(x, device)
        self.mean = rows.mean(0)
        scale = rows.std(0, correction=0)
        # Features that (nearly) never change must not be blown up.
        self.scale = scale.clamp(min=1e-3 * float(scale.max())) + 1e-12
        # In place: of a million images there is no room for two.
        self.rows = rows.sub_(self.mean).div_(self.scale)
        self.basis: Tensor | None = None
        if rows.shape[1] > rows.shape[0]:
            self.basis, self.rows = _span(self.rows)

    def start(self) -> tuple[Tensor, Tensor]:
        dim, device = self.rows.shape[1], self.rows.device
        return (
            torch.zeros(dim, self.num_classes, device=device),
            torch.zeros(self.num_classes, device=device),
        )

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
    # Minimises mean cross-entropy + weight_decay / 2 * |W|^2 by L-BFGS. The problem is convex: the
    # start decides about the time only.
    weight, bias = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()  # L-BFGS enables it, and a graph would keep the logits of all rows
    def closure() -> Tensor:
        loss, weight.grad, bias.grad = _loss_and_gradient(rows, labels, weight, bias)
        weight.grad += weight_decay * weight
        return loss + 0.5 * weight_decay * weight.square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _loss_and_gradient(
    rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy and what it gives weight and bias, without logits of all rows at once."""
    loss, of_weight, of_bias = (torch.zeros_like(x) for x in (bias.sum(), weight, bias))
    for part in _parts(len(rows), len(bias)):
        truth = labels[part, None]
        # Products with the narrow matrix on the left are four times as fast on a CPU.
        logits = torch.log_softmax((weight.T @ rows[part].T).T + bias, dim=1)
        loss -= logits.gather(1, truth).sum()
        error = logits.exp_()
        error.scatter_add_(1, truth, -torch.ones_like(truth, dtype=error.dtype))
        of_weight += (error.T @ rows[part]).T
        of_bias += error.sum(0)
    return loss / len(rows), of_weight / len(rows), of_bias / len(rows)


@torch.no_grad()
def seconds_of_chosen_linear(
    count: int, dim: int, *, num_layers: int, num_classes: int, device: Device = "cpu"
) -> float:
    """What `chosen_linear` takes, reckoned from one of its solutions, made for `count` random rows.

    That one takes all its steps, as those of real features nearly all do. With more features than
    rows each problem also wants a basis of its span.
    """
    draw = torch.Generator().manual_seed(0)
    width = min(count, dim)
    # As of networks, few directions are large.
    mixed = torch.randn(width, width, generator=draw) * torch.logspace(0, -3, width)[:, None]
    rows = torch.randn(count, width, generator=draw).to(device) @ mixed.to(device)
    rows /= rows.std(0)
    labels = torch.randint(num_classes, (count,), generator=draw).to(device)
    zeros = torch.zeros(width, num_classes, device=device), torch.zeros(num_classes, device=device)
    _solve(rows[:2], labels[:2], zeros, TRIAL_WEIGHT_DECAY, max_iterations=2)  # warms up
    start = time.monotonic()
    _solve(rows, labels, zeros, TRIAL_WEIGHT_DECAY)
    solutions = (num_layers + len(WEIGHT_DECAYS) + 1) * (time.monotonic() - start)
    spans = (num_layers + 1) * _seconds_of_cubic(_span, count, dim, device) if dim > count else 0.0
    return solutions + spans


def seconds_of_rankme(count: int, dim: int, *, device: Device = "cpu") -> float:
    """What `rankme` takes."""
    return _seconds_of_cubic(lambda rows: rankme(rows, device=device), count, dim, device)


def _seconds_of_cubic(
    work: Callable[[Tensor], object], count: int, dim: int, device: Device
) -> float:
    """Reckoned from a smaller matrix: the time grows with the cube of the side, or less."""
    smaller = min(1.0, CUBIC_ROWS / min(count, dim))
    shape = math.ceil(count * smaller), math.ceil(dim * smaller)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = 0.0
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        work(rows)
    return (time.monotonic() - start) / smaller**3


def seconds_of_knn(
    known: int, tested: int, dim: int, *, num_layers: int, num_classes: int, device: Device = "cpu"
) -> float:
    """What k-NN of a fold takes, reckoned from a few rows against all that are known."""
    rows, labels = np.zeros((known, dim), np.float32), np.zeros(known, np.int64)
    few = rows[:KNN_ROWS]
    start = 0.0
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        knn_predict(rows, labels, few, num_classes=num_classes, device=device)
    # For each layer to choose from, the fifth to choose by against the rest.
    compared = num_layers * 0.2 * 0.8 * known + tested
    return (time.monotonic() - start) * max(1.0, compared / len(few))


@torch.no_grad()
def chosen_linear(
    layers: Sequence[Any],
    y: Any,
    train: np.ndarray,
    validation: np.ndarray,
    *,
    num_classes: int,
    device: Device = "cpu",
) -> tuple[LinearProbe, int, float, list[float]]:
    """The linear probe of the best layer with the best weight decay, both by validation rows.

    Args:
        layers: features (n, d) of the same rows after different blocks.
        y: classes (n,).
        train: row numbers to fit on.
        validation: row numbers to choose by; the final probe is fitted on both.
        num_classes: number of classes.
        device: where it is computed; it holds the features of one layer.

    Returns:
        probe, position in `layers`, weight decay, validation accuracy of every layer.
    """
    rows, most = np.concatenate([train, validation]), len(train)
    labels = _labels(np.asarray(y)[rows], device)

    def posed(layer: int) -> _Problem:
        # Mean and scale come from the rows to fit on and to choose by, never from test rows.
        return _Problem(layers[layer][rows], num_classes=num_classes, device=device)

    by_layer: list[float] = []
    for layer in range(len(layers)):
        problem = posed(layer)
        solution = _solve(problem.rows[:most], labels[:most], problem.start(), TRIAL_WEIGHT_DECAY)
        by_layer.append(_accuracy(problem.rows[most:], labels[most:], solution))
        if layer < len(layers) - 1:
            del problem  # memory holds one at a time
    chosen = int(len(by_layer) - 1 - np.argmax(by_layer[::-1]))
    if chosen < len(layers) - 1:
        del problem
        problem = posed(chosen)
    best, best_decay, solution = -1.0, TRIAL_WEIGHT_DECAY, problem.start()
    for decay in WEIGHT_DECAYS:
        solution = _solve(problem.rows[:most], labels[:most], solution, decay)
        accuracy = _accuracy(problem.rows[most:], labels[most:], solution)
        if accuracy > best:
            best, best_decay = accuracy, decay
    final = _solve(problem.rows, labels, solution, best_decay)
    return problem.probe(final), chosen, best_decay, by_layer


def _accuracy(rows: Tensor, labels: Tensor, solution: tuple[Tensor, Tensor]) -> float:
    weight, bias = solution
    return float(((rows @ weight + bias).argmax(1) == labels).float().mean())


@torch.no_grad()
def rankme(features: Any, *, device: Device = "cpu") -> float:
    """Effective number of directions that features (n, d) use, from 1 to the smaller of both.

    RankMe (arXiv 2210.02885, equation 3): exp of the entropy of the singular values as shares.
    They are the roots of the eigenvalues of the smaller Gram matrix, which a million rows fit into.
    """
    rows = _features(features, device)
    if len(rows) < rows.shape[1]:
        rows = rows.T
    side = rows.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=device)
    for part in _parts(len(rows), side):
        wide = rows[part].double()
        gram.addmm_(wide.T, wide)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


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
    correct: np.ndarray, groups: Sequence[str] | np.ndarray, *, seed: int, num_draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean of `correct` (n,), by drawing whole groups with replacement.

    Rows of one group are near-duplicates; drawing them one by one would promise too much. Takes
    differences of two `correct` too: the paired interval. Groups by name, or numbered in the order
    of names, give the same.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    total = np.bincount(index, weights=np.asarray(correct, dtype=np.float64))
    size = np.bincount(index).astype(np.float64)
    generator = np.random.default_rng([seed, 2])
    means = np.empty(num_draws)
    for draw in range(num_draws):
        chosen = generator.integers(0, len(size), len(size))
        means[draw] = total[chosen].sum() / size[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


T_975 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t by degrees of freedom, from `LEAST_FREEDOM`."""
LEAST_FREEDOM = 2
"""Degrees of freedom of an interval over seeds. With one, of two seeds, it would be nine times as
wide as they lie apart."""


def seeds_half_width(*arms: Sequence[float]) -> float:
    """Half the 95 % interval, over seeds, of a mean (one arm) or a difference of means (two).

    Student's t, by the variance within arms, pooled. 0 where seeds are too few to say anything
    (`enough_seeds`).
    """
    freedom = sum(len(arm) - 1 for arm in arms)
    if not enough_seeds(*arms):
        return 0.0
    known = freedom - LEAST_FREEDOM
    t = T_975[known] if known < len(T_975) else 1.96 + 2.66 / freedom
    variance = sum(len(arm) * float(np.var(arm)) for arm in arms) / freedom
    return t * math.sqrt(variance * sum(1 / len(arm) for arm in arms))


def enough_seeds(*arms: Sequence[Any]) -> bool:
    """Whether an interval can be over seeds: three of one arm, or two of each of two arms."""
    return sum(len(arm) - 1 for arm in arms) >= LEAST_FREEDOM


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


def _features(x: Any, device: Device) -> Tensor:
    """A copy of one's own."""
    return torch.as_tensor(np.asarray(x)).to(device, torch.float32, copy=True)


def _parts(count: int, width: int) -> list[slice]:
    """Rows of a matrix (count, width), not too many at a time."""
    size = max(1, CHUNK // max(width, 1))
    return [slice(start, start + size) for start in range(0, count, size)]


def _labels(y: Any, device: Device) -> Tensor:
    return torch.as_tensor(np.asarray(y)).to(device, torch.int64)


def _span(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (d, n) that span rows (n, d), and the rows in that basis (n, n)."""
    basis, coordinates = torch.linalg.qr(rows.T)
    return basis, coordinates.T.contiguous()
