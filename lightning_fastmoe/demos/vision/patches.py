"""Patches: from an image to a grid of tokens, and from a grid to one of half the side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fastmoe.nn.transformer import Linear


class PatchEmbedding(nn.Module):
    """Makes each square patch of an image a token, normalised.

    Args:
        channels: colours of a pixel, C.
        d_model: width of a token, D.
        size: pixels along a patch's side, p.
    """

    def __init__(self, channels: int, d_model: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, d_model, kernel_size=size, stride=size)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H/p, W/p, D)."""
        out: Tensor = self.norm(self.projection(images).permute(0, 2, 3, 1))
        return out


class PatchMerging(nn.Module):
    """Makes each 2 x 2 tokens one of twice the width, normalised after (Swin V2).

    Args:
        d_model: width of the tokens that come in, D.
        init_std: standard deviation of the initial weights.
    """

    def __init__(self, d_model: int, init_std: float) -> None:
        super().__init__()
        self.projection = Linear(4 * d_model, 2 * d_model, init_std)
        self.norm = nn.LayerNorm(2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H/2, W/2, 2D)."""
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.norm(self.projection(torch.cat(corners, dim=-1)))
        return out
