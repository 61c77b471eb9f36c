"""Floating-point operations of the parts of a network, 2 per multiply-add.

Matrix products only; recomputation is not counted.
"""


def patch_embedding(num_patches: int, patch_size: int, dim: int) -> float:
    """Forward pass of the patch embedding of one image."""
    return 2 * num_patches * dim * 3 * patch_size**2


def block(tokens: float, dim: int, mlp_ratio: float, *, rows: float | None = None) -> float:
    """Forward pass of a transformer block on one image, cls counted among `tokens`.

    T * dim^2 * (8 + 4 * mlp_ratio) + 4 * T^2 * dim. With `rows` the output projection and the MLP
    are evaluated for so many tokens only.
    """
    rows = tokens if rows is None else rows
    attention = 6 * tokens * dim**2 + 4 * tokens**2 * dim
    return attention + rows * dim**2 * (2 + 4 * mlp_ratio)


def linear(rows: float, inputs: int, outputs: int) -> float:
    """Forward pass of a linear layer."""
    return 2 * rows * inputs * outputs


def with_backward(forward: float, embedding: float) -> float:
    """Forward and backward pass: the latter costs twice the former, less the gradient with
    respect to pixels, of which `embedding` is a part of `forward`."""
    return 3 * forward - embedding
