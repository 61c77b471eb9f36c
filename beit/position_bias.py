"""Relative position bias: one number a head for each offset between two patches of the grid.

One module of it is shared by all blocks in pretraining; in fine-tuning each attention has a table
of its own. Names and order of rows are those of the official files (microsoft/unilm at 768a3c8,
`beit/modeling_pretrain.py`).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_position_index(grid_size: tuple[int, int]) -> Tensor:
    """Row of the bias table for each (query, key) pair: int64 (1+H*W, 1+H*W), cls first.

    The table has (2H-1)(2W-1) rows for patch offsets, row-major in (dy, dx), then three for
    cls -> patch, patch -> cls and cls -> cls.
    """
    H, W = grid_size
    row, col = torch.arange(H * W) // W, torch.arange(H * W) % W
    dy = row[:, None] - row[None, :] + H - 1
    dx = col[:, None] - col[None, :] + W - 1
    num_offsets = (2 * H - 1) * (2 * W - 1)
    index = torch.empty(H * W + 1, H * W + 1, dtype=torch.int64)
    index[1:, 1:] = dy * (2 * W - 1) + dx
    index[0, :] = num_offsets
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


def bias_table_rows(grid_size: tuple[int, int]) -> int:
    """Rows of a relative position bias table for this grid (732 for 14 x 14)."""
    return (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + 3


class RelativePositionBias(nn.Module):
    """One table of biases, looked up for every (query, key) pair of tokens."""

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, grid_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        add_bias_table(self, grid_size, num_heads)

    def forward(self) -> Tensor:
        """Bias to add to attention logits: (1, heads, 1+N, 1+N)."""
        return look_up_bias(self.relative_position_bias_table, self.relative_position_index)


def add_bias_table(module: nn.Module, grid_size: tuple[int, int], num_heads: int) -> None:
    """Gives `module` a table of zeros (rows, heads), and the index of its rows."""
    table = nn.Parameter(torch.zeros(bias_table_rows(grid_size), num_heads))
    module.register_parameter("relative_position_bias_table", table)
    index = relative_position_index(grid_size)
    module.register_buffer("relative_position_index", index, persistent=False)
    module.register_load_state_dict_pre_hook(_accept_index_buffer)  # type: ignore[no-untyped-call]


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table (rows, heads) at index (T, T): (1, heads, T, T), to add to attention logits."""
    flat = F.embedding(index.flatten(), table)
    return flat.view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0).contiguous()


def _accept_index_buffer(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Official files carry the index as a buffer: take it only where it says what ours says."""
    name = prefix + "relative_position_index"
    if name not in state_dict:
        return
    ours = cast(Tensor, module.relative_position_index)
    theirs = state_dict.pop(name)
    if theirs.shape != ours.shape or not torch.equal(theirs.to(ours), ours):
        raise ValueError(
            f"{name}: {tuple(theirs.shape)} is the index of another patch grid than this "
            f"model's {tuple(ours.shape)}; build the model for that image_size, or resize the "
            "weights with beit.positions.resize_positions"
        )
