"""Networks for other image sizes: positions resized, everything else as it is.

Relative position tables grow by the geometric interpolation of the official fine-tuning code
(microsoft/unilm at 768a3c8, `beit/run_class_finetuning.py`): the offsets of the old table are
spread over the new range at geometrically growing distances, so that near neighbours keep their
biases and only far ones are stretched; a cubic spline gives the values between. (Linear
interpolation costs accuracy: unilm issue 376.) The official code reads the spline off SciPy's
`interp2d`, which is gone; the same not-a-knot spline is solved for here.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit.vit import BeitEncoder

AnyEncoder = TypeVar("AnyEncoder", bound=BeitEncoder)
Floats = NDArray[np.float64]


def geometric_offsets(old_span: int, new_span: int) -> Floats:
    """Where the old offsets -old_span..old_span lie among -new_span..new_span: float64.

    Steps from the centre are 1, q, q^2, ... with q such that they sum to new_span. A table that
    shrinks keeps its distances (q = 1).
    """
    if new_span <= old_span:
        ratio = 1.0
    else:
        low, high = 1.0, float(new_span)
        while high - low > 1e-12 * high:
            ratio = (low + high) / 2
            if np.sum(ratio ** np.arange(old_span)) > new_span:
                high = ratio
            else:
                low = ratio
        ratio = low
    distances: Floats = np.cumsum(ratio ** np.arange(old_span, dtype=np.float64))
    return np.concatenate([-distances[::-1], [0.0], distances])


def spline_matrix(knots: Floats, points: Floats) -> Floats:
    """Matrix (points, knots) that evaluates the interpolating spline: cubic, not-a-knot ends.

    Points outside the knots take the value at the end. Fewer than four knots give the
    polynomial through them.
    """
    n = len(knots)
    points = np.clip(points, knots[0], knots[-1])
    if n < 4:
        powers = np.arange(n)
        return np.asarray(points[:, None] ** powers @ np.linalg.inv(knots[:, None] ** powers))
    h = np.diff(knots)
    # Second derivatives m at the knots solve left @ m = right @ values.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = h[i - 1] / 6, (h[i - 1] + h[i]) / 3, h[i] / 6
        right[i, i - 1 : i + 2] = 1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]
    # Not-a-knot: one cubic over the first two intervals, and one over the last two.
    left[0, :3] = -h[1], h[0] + h[1], -h[0]
    left[-1, -3:] = -h[-1], h[-2] + h[-1], -h[-2]
    second = np.linalg.solve(left, right)
    at = np.clip(np.searchsorted(knots, points, side="right") - 1, 0, n - 2)
    a, b = (knots[at + 1] - points) / h[at], (points - knots[at]) / h[at]
    identity = np.eye(n)
    values = a[:, None] * identity[at] + b[:, None] * identity[at + 1]
    curvature = ((a**3 - a) * h[at] ** 2 / 6)[:, None] * second[at]
    curvature += ((b**3 - b) * h[at] ** 2 / 6)[:, None] * second[at + 1]
    return np.asarray(values + curvature)


def resize_bias_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """A relative position bias table (rows, heads) of `old_grid` for `new_grid`.

    The three rows that concern cls are kept.
    """
    if old_grid == new_grid:
        return table.clone()
    rows, columns = (
        spline_matrix(
            geometric_offsets(old - 1, new - 1), np.arange(-(new - 1), new, dtype=np.float64)
        )
        for old, new in zip(old_grid, new_grid, strict=True)
    )
    offsets = table[:-3].double().cpu().numpy()
    grid = offsets.reshape(2 * old_grid[0] - 1, 2 * old_grid[1] - 1, -1)
    resized = np.einsum("yi,xj,ijh->yxh", rows, columns, grid).reshape(-1, table.shape[1])
    return torch.cat((torch.from_numpy(resized).to(table), table[-3:]))


def resize_absolute(
    positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Learned positions (1, 1+N, dim) for another grid: bicubic, that of cls kept."""
    if old_grid == new_grid:
        return positions.clone()
    # (1, N, dim) -> (1, dim, H, W) and back
    patches = positions[:, 1:].float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], resized.flatten(2).transpose(1, 2).to(positions)), dim=1)


def resize_positions(model: AnyEncoder, image_size: int | tuple[int, int]) -> AnyEncoder:
    """A copy of `model` for images of `image_size` pixels (int or height, width)."""
    size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    resized = type(model)(**{**model.config(), "image_size": tuple(size)})
    old, new = model.grid_size, resized.grid_size
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            state[name] = resize_bias_table(value, old, new)
        elif name in ("pos_embed", "decoder_pos_embed"):
            state[name] = resize_absolute(value, old, new)
        else:
            state[name] = value.clone()
    resized.load_state_dict(state, strict=True)
    return resized.train(model.training)
