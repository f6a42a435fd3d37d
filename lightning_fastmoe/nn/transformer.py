"""Building blocks of this package's transformers: dense layers, embeddings, rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer with weights drawn from N(0, ``init_std``^2) and a zero bias, if any."""

    def __init__(
        self, in_features: int, out_features: int, init_std: float, *, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        nn.init.normal_(self.weight, std=init_std)
        if bias:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding with vectors drawn from N(0, ``init_std``^2)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        nn.init.normal_(self.weight, std=init_std)


def rotary_table(
    seq_len: int,
    head_dim: int,
    device: torch.device,
    base: float = 10_000.0,
    positions: Tensor | None = None,
) -> Tensor:
    """Angles of rotary position embedding (Su et al. 2021), as cosines and sines.

    Computed in fp32 at each forward pass: as a buffer it would be cast to bf16 together with the
    weights, and bf16 can't tell position 1000 from 1001.

    Args:
        seq_len: number of positions.
        head_dim: width of a head.
        device: the device of the table.
        base: base of the geometric series of angles.
        positions: (batch, seq_len) integers; None for 0, 1, ..., seq_len - 1 in each row.

    Returns:
        fp32, shape (2, seq_len, head_dim / 2), or (2, batch, 1, seq_len, head_dim / 2) with
        ``positions``.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    if positions is None:
        places = torch.arange(seq_len, device=device, dtype=torch.float32)
    else:
        places = positions.unsqueeze(1).to(torch.float32)
    angles = places.unsqueeze(-1) * base**-exponents
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its position's angle.

    Args:
        x: queries or keys, (..., seq_len, head_dim).
        table: from :func:`rotary_table`.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    cos, sin = table
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def rows_of_table(table: Tensor, start: int, stop: int) -> Tensor:
    """The part of a :func:`rotary_table` for rows ``start`` to ``stop`` of its positions."""
    return table if table.dim() == 3 else table[:, start:stop]
