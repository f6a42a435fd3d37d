"""The activation functions of experts, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.errors import ConfigError

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""Gated activations (GLU variants, Shazeer 2020) -> the plain activation applied to the gate."""

ACTIVATIONS = (*GATED, *_PLAIN)
"""The names that ``expert_layer`` and the kernels support, gated ones first."""

CLAMPED_SWIGLU = "clamped_swiglu"
"""gpt-oss's SwiGLU; computed by PyTorch's operators."""

SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def is_gated(name: str) -> bool:
    """Whether ``name`` is a gated activation, whose up projection has 2F rows.

    Raises:
        ConfigError: for an unknown name, with the list of known ones.
    """
    if name not in (*ACTIVATIONS, CLAMPED_SWIGLU):
        raise ConfigError(
            f"activation={name!r} is unknown. It must be one of:"
            f" {', '.join((*ACTIVATIONS, CLAMPED_SWIGLU))}."
        )
    return name in GATED or name == CLAMPED_SWIGLU


def apply_activation(h: Tensor, name: str) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names (gate half first), else elementwise."""
    if is_gated(name):
        gate, up = h.chunk(2, dim=-1)
        if name == CLAMPED_SWIGLU:
            return clamped_swiglu(gate, up)
        return _PLAIN[GATED[name]](gate) * up
    return _PLAIN[name](h)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``g sigmoid(1.702 g) (u + 1)``, g clamped to at most 7 and u to [-7, 7] (gpt-oss, 2025).

    gpt-oss stores the rows of gate and up alternately; here, as everywhere, the gate's come first.
    """
    gate = gate.clamp(max=SWIGLU_LIMIT)
    up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
