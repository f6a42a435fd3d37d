"""Windows of an image's tokens, and which of them attend to each other after a shift."""

from __future__ import annotations

import torch
from torch import Tensor


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cuts a grid of tokens into square windows that don't overlap.

    Args:
        x: (B, H, W, D); ``size`` divides H and W.
        size: tokens along a window's side, s.

    Returns:
        (B * H/s * W/s, s * s, D): the windows of an image row by row, and in each its tokens row
        by row.
    """
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height // size, size, width // size, size, channels)
    return cut.transpose(2, 3).reshape(-1, size * size, channels)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Puts the windows of :func:`window_partition` back together.

    Args:
        windows: (B * H/s * W/s, s * s, D).
        size: s.
        height: H.
        width: W.

    Returns:
        (B, H, W, D).
    """
    channels = windows.shape[-1]
    cut = windows.reshape(-1, height // size, width // size, size, size, channels)
    return cut.transpose(2, 3).reshape(-1, height, width, channels)


def shift_mask(height: int, width: int, size: int, shift: int) -> Tensor:
    """Which tokens of a window attend to each other in a rolled grid (Swin, Liu et al. 2021).

    Rolling by ``-shift`` brings the first rows and columns beside the last ones, so that windows at
    the border hold tokens from opposite sides of the image. A token attends only to those that it
    also was beside before.

    Args:
        height: rows of the grid, H.
        width: columns of the grid, W.
        size: tokens along a window's side, s; it divides H and W.
        shift: rows and columns that the grid was rolled by, below s.

    Returns:
        bool, (H/s * W/s, s * s, s * s): True for the pairs that attend to each other, in the order
        of :func:`window_partition`.
    """
    # In the rolled grid only the last windows have a seam, `shift` before their end: a 1 beyond it.
    rows = (torch.arange(height) >= height - shift).long()
    columns = (torch.arange(width) >= width - shift).long()
    regions = rows[:, None] * 2 + columns  # (H, W)
    by_window = window_partition(regions[None, :, :, None], size).squeeze(-1)
    return by_window[:, :, None] == by_window[:, None, :]
