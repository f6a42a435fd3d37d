"""One layer of the vision transformer: attention within windows, then a feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fastmoe.demos.vision.attention import WindowAttention
from lightning_fastmoe.demos.vision.windows import shift_mask, window_partition, window_reverse
from lightning_fastmoe.nn.transformer import Linear


class FeedForward(nn.Sequential):
    """The dense feed-forward block: two linear layers with biases, and a GELU between them."""

    def __init__(self, d_model: int, d_ffn: int, init_std: float) -> None:
        super().__init__(
            Linear(d_model, d_ffn, init_std, bias=True),
            nn.GELU(),
            Linear(d_ffn, d_model, init_std, bias=True),
        )


class SwinBlock(nn.Module):
    """Attention within (shifted) windows, then ``ffn``, each normalised before it is added.

    Swin V2's res-post-norm: what a block adds has the same size at any depth, where with norms
    before the branches activations grow with each layer.

    Args:
        grid: tokens along the image's side.
        attention: attention within windows.
        ffn: maps (B, H, W, D) to the same shape, a mixture of experts or not.
        d_model: width of a token, D.
        size: tokens along a window's side; it divides ``grid``.
        shift: rows and columns by which windows are moved; 0 leaves them where they are.
    """

    mask: Tensor | None

    def __init__(
        self,
        grid: int,
        attention: WindowAttention,
        ffn: nn.Module,
        d_model: int,
        size: int,
        shift: int,
    ) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.attention = attention
        self.attention_norm = nn.LayerNorm(d_model)
        self.ffn = ffn
        self.ffn_norm = nn.LayerNorm(d_model)
        mask = shift_mask(grid, grid, size, shift) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms (B, H, W, D)."""
        x = x + self.attention_norm(self._attend(x))
        out: Tensor = x + self.ffn_norm(self.ffn(x))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        windows = self.attention(window_partition(x, self.size), self.mask)
        x = window_reverse(windows, self.size, height, width)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        return x
