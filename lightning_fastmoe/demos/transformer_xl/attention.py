"""Attention over relative positions, by which a segment can look back into the one before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe.nn.transformer import Linear


def sinusoids(length: int, d_model: int, like: Tensor) -> Tensor:
    """Encodings of the distances ``length - 1, ..., 1, 0``: sines, then cosines.

    They form a geometric series of wavelengths, as in Vaswani et al. (2017).

    Args:
        length: number of distances.
        d_model: width of an encoding; even.
        like: gives device and dtype; bf16 and fp16 are computed in fp32.

    Returns:
        (length, d_model), the longest distance first.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, d_model, 2, device=like.device, dtype=wide) / d_model
    distances = torch.arange(length - 1, -1, -1, device=like.device, dtype=wide)
    angles = distances.unsqueeze(-1) * 10_000.0**-exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(like.dtype)


def relative_shift(by_distance: Tensor) -> Tensor:
    """Turns scores by distance into scores by key (Dai et al. 2019, appendix B).

    Query i is at position ``K - L + i``, so it is at distance 0 from key ``K - L + i``, and row i
    moves left by ``L - 1 - i``. For L = 2, K = 3, where ``d`` is a distance and ``.`` a later key,
    whose value is meaningless::

        d2 d1 d0        d1 d0 .
        d2 d1 d0   ->   d2 d1 d0

    Args:
        by_distance: (..., L, K), L <= K; column c is for distance K - 1 - c.

    Returns:
        (..., L, K); column j is for key j.
    """
    *batch, queries, keys = by_distance.shape
    # One more column makes each row start one element later in memory, relative to rows of K.
    padded = F.pad(by_distance, (1, 0)).reshape(*batch, keys + 1, queries)
    return padded[..., 1:, :].reshape(*batch, queries, keys)


class RelativeAttention(nn.Module):
    """Causal multi-head attention of Transformer-XL (Dai et al. 2019).

    The score of query i for key j has a term of content and one of position::

        ((q_i + u) . k_j  +  (q_i + v) . W r_{i-j}) / sqrt(head_dim)

    ``u`` and ``v`` are learned vectors of each head, ``r`` the encoding of a distance, and W a
    learned matrix. Only distances enter, so keys from an earlier segment need no positions.

    Args:
        d_model: width of the residual stream; even.
        num_heads: heads; must divide ``d_model``.
        init_std: standard deviation of the initial weights.
    """

    def __init__(self, d_model: int, num_heads: int, init_std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(d_model, d_model, init_std)
        self.key_value = Linear(d_model, 2 * d_model, init_std)
        self.position = Linear(d_model, d_model, init_std)
        self.out = Linear(d_model, d_model, init_std)
        heads = (num_heads, 1, d_model // num_heads)
        self.content_bias = nn.Parameter(torch.randn(heads) * init_std)  # u
        self.position_bias = nn.Parameter(torch.randn(heads) * init_std)  # v

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Mixes a segment over its own positions and those of the memory.

        Args:
            x: the segment, (batch, L, d_model).
            memory: what came just before it, (batch, M, d_model); every query sees all of it.

        Returns:
            (batch, L, d_model).
        """
        batch, length, d_model = x.shape
        seen = x if memory is None else torch.cat((memory, x), dim=1)
        keys = seen.shape[1]  # K = M + L
        query = self.query(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        key, value = (
            self.key_value(seen).view(batch, keys, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        )
        encoded = self.position(sinusoids(keys, d_model, x))
        position = encoded.view(keys, self.num_heads, -1).permute(1, 2, 0)  # (heads, head_dim, K)
        by_distance = (query + self.position_bias.to(query.dtype)) @ position
        later = torch.ones(length, keys, dtype=torch.bool, device=x.device).triu(keys - length + 1)
        scores = relative_shift(by_distance) * (d_model // self.num_heads) ** -0.5
        mixed = F.scaled_dot_product_attention(
            query + self.content_bias.to(query.dtype),
            key,
            value,
            attn_mask=scores.masked_fill(later, -torch.inf),
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, d_model))
        return out
