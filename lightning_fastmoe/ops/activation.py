"""The activation functions of experts, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.errors import ConfigError


class Plain(NamedTuple):
    """An elementwise activation with a gradient of its own.

    Attributes:
        value: x -> act(x).
        backward: (gradient of act(x), x) -> gradient of x.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


class Composed(NamedTuple):
    """An activation that is differentiated by autograd.

    Attributes:
        is_gated: whether its input is (N, 2F), gate half first, rather than (N, F).
        value: the input -> (N, F).
    """

    is_gated: bool
    value: Callable[[Tensor], Tensor]


SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def clamped_swiglu(h: Tensor) -> Tensor:
    """``g sigmoid(1.702 g) (u + 1)``, g clamped to at most 7 and u to [-7, 7] (gpt-oss, 2025).

    gpt-oss stores the rows of gate and up alternately; here, as everywhere, the gate's come first.
    """
    gate, up = h.chunk(2, dim=-1)
    gate = gate.clamp(max=SWIGLU_LIMIT)
    up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


PLAIN: dict[str, Plain] = {
    "silu": Plain(F.silu, torch.ops.aten.silu_backward),
    "gelu": Plain(F.gelu, torch.ops.aten.gelu_backward),
    "relu": Plain(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
}
"""The elementwise activations that the CUDA kernels implement, too."""

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""Gated activations (GLU variants, Shazeer 2020) -> the plain activation applied to the gate."""

ACTIVATIONS = (*GATED, *PLAIN)
"""The names that ``expert_layer`` and the kernels support, gated ones first."""

COMPOSED: dict[str, Composed] = {"clamped_swiglu": Composed(True, clamped_swiglu)}
"""Activations that PyTorch's operators compute on every device, between our grouped GEMMs."""


def is_gated(name: str) -> bool:
    """Whether ``name`` is a gated activation, whose up projection has 2F rows.

    Raises:
        ConfigError: for an unknown name, with the list of known ones.
    """
    if name in COMPOSED:
        return COMPOSED[name].is_gated
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation={name!r} is unknown. It must be one of:"
            f" {', '.join((*ACTIVATIONS, *COMPOSED))}."
        )
    return name in GATED


def apply_activation(h: Tensor, name: str) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names (gate half first), else elementwise."""
    gated = is_gated(name)
    if name in COMPOSED:
        return COMPOSED[name].value(h)
    if gated:
        gate, up = h.chunk(2, dim=-1)
        return PLAIN[GATED[name]].value(gate) * up
    return PLAIN[name].value(h)
