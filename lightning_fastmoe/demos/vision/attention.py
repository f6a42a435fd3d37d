"""Scaled cosine attention within windows (Swin V2, Liu et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_fastmoe.demos.vision.position_bias import PositionBias
from lightning_fastmoe.nn.router.interface import unit_vectors
from lightning_fastmoe.nn.transformer import Linear

_INITIAL_SCALE = 10.0
_LARGEST_SCALE = 100.0
"""1 / tau: the temperature tau is 0.1 at first, and never below 0.01."""


class WindowAttention(nn.Module):
    """Multi-head self-attention among the tokens of a window.

    ``scores[h, i, j] = cos(q_i, k_j) / tau_h + bias[h, i, j]``: cosines don't grow with the
    activations, so that no pair dominates in wide models. tau is learned per head as
    ``exp(-log_scale)``. Keys have no bias.

    Args:
        d_model: width of a token, D; a multiple of ``num_heads``.
        num_heads: attention heads.
        size: tokens along a window's side, s.
        bias_hidden: inner width of the network of relative positions.
        init_std: standard deviation of the initial weights.
    """

    def __init__(
        self, d_model: int, num_heads: int, size: int, bias_hidden: int, init_std: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(d_model, 3 * d_model, init_std)
        self.query_bias = nn.Parameter(torch.zeros(d_model))
        self.value_bias = nn.Parameter(torch.zeros(d_model))
        self.log_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(_INITIAL_SCALE)))
        self.position_bias = PositionBias(size, num_heads, bias_hidden, init_std)
        self.out = Linear(d_model, d_model, init_std, bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mixes the tokens of each window.

        Args:
            x: (N, s * s, D), windows of one or more images.
            mask: bool, (windows of an image, s * s, s * s), True where tokens attend to each
                other; each attends to itself. None: all do.

        Returns:
            (N, s * s, D).
        """
        windows, tokens, d_model = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (
            part.view(windows, tokens, self.num_heads, -1).transpose(1, 2)
            for part in (query + self.query_bias, key, value + self.value_bias)
        )
        scores = self._scores(query, key)
        if mask is not None:
            by_image = scores.view(-1, len(mask), *scores.shape[1:])
            scores = by_image.masked_fill(~mask.unsqueeze(1), -math.inf).view_as(scores)
        mixed = torch.softmax(scores, dim=-1).to(value.dtype) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(windows, tokens, d_model))
        return out

    # Outside of autocast: the scale multiplies the rounding error of a cosine by up to 100.
    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(N, heads, s * s, s * s) from (N, heads, s * s, D / heads), in fp32 or fp64."""
        with torch.autocast(query.device.type, enabled=False):
            cosines = unit_vectors(wide(query)) @ unit_vectors(wide(key)).transpose(-2, -1)
            scale = wide(self.log_scale).clamp(max=math.log(_LARGEST_SCALE)).exp()
            return cosines * scale + wide(self.position_bias())


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, unless it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
