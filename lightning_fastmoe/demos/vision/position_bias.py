"""Relative positions in a window as a small network sees them (Swin V2, Liu et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fastmoe.nn.transformer import Linear

LARGEST_BIAS = 16.0


class PositionBias(nn.Module):
    """A bias of attention scores: a function of the log-spaced distance of two tokens.

    ``bias[h, i, j] = 16 sigmoid(MLP(log(row_i - row_j), log(column_i - column_j))[h])``. A network
    of coordinates, in the place of a table of learned numbers, carries over to other sizes of
    windows; logarithms keep their distances close to those that were trained.

    Args:
        size: tokens along a window's side, s.
        num_heads: heads of the attention.
        hidden: inner width of the network.
        init_std: standard deviation of its initial weights.
    """

    coordinates: Tensor
    index: Tensor

    def __init__(self, size: int, num_heads: int, hidden: int, init_std: float) -> None:
        super().__init__()
        self.register_buffer("coordinates", log_spaced_offsets(size), persistent=False)
        self.register_buffer("index", offset_index(size), persistent=False)
        self.up = Linear(2, hidden, init_std, bias=True)
        self.down = Linear(hidden, num_heads, init_std)

    def forward(self) -> Tensor:
        """The bias of each pair of tokens, (heads, s * s, s * s), between 0 and 16."""
        # In the dtype of the weights: under ZeRO in bf16, buffers stay fp32.
        coordinates = self.coordinates.to(self.up.weight.dtype)
        by_offset = self.down(torch.relu(self.up(coordinates)))  # once per distance
        return (LARGEST_BIAS * torch.sigmoid(by_offset))[self.index].permute(2, 0, 1)


def log_spaced_offsets(size: int) -> Tensor:
    """The logarithmic distances of all pairs of tokens that differ.

    A distance d is first scaled such that the largest is 8, then ``sign(d) log2(1 + |d|) / 3``.

    Args:
        size: tokens along a window's side, s.

    Returns:
        ((2s - 1)^2, 2): distances of rows and of columns, the latter change fastest. In torch's
        default dtype.
    """
    steps = torch.arange(1 - size, size, dtype=torch.get_default_dtype())
    scaled = 8.0 / max(1, size - 1) * steps
    logs = torch.sign(scaled) * torch.log2(1.0 + scaled.abs()) / 3.0
    return torch.cartesian_prod(logs, logs)


def offset_index(size: int) -> Tensor:
    """The row of :func:`log_spaced_offsets` for each pair of a window's tokens.

    Returns:
        int64, (s * s, s * s); [i, j] is of token i's position minus token j's.
    """
    tokens = torch.arange(size * size)
    rows, columns = tokens // size, tokens % size
    row_steps = rows[:, None] - rows + size - 1
    column_steps = columns[:, None] - columns + size - 1
    return row_steps * (2 * size - 1) + column_steps
