"""The activations of an expert, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.errors import ConfigError

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""Gated activations (GLU variants, Shazeer 2020) and the plain one that they apply to the gate."""

ACTIVATIONS = (*GATED, *_PLAIN)
"""All names, gated ones first."""


def is_gated(name: str) -> bool:
    """Whether ``name`` is a gated activation, whose up projection has 2F rows.

    Raises:
        ConfigError: for an unknown name, with the list of known ones.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation={name!r} is unknown. It must be one of: {', '.join(ACTIVATIONS)}."
        )
    return name in GATED


def apply_activation(h: Tensor, name: str) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names (gate half first), else elementwise."""
    if is_gated(name):
        gate, up = h.chunk(2, dim=-1)
        return _PLAIN[GATED[name]](gate) * up
    return _PLAIN[name](h)
