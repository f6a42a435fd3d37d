"""The shared expert: a dense FFN applied to every token alongside the routed experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import init_gate


class SharedExpert(nn.Module):
    """A dense FFN, or any module, on all tokens (DeepSeekMoE), optionally gated (Qwen2-MoE).

    ``y = g(x) * ffn(x)`` with ``g(x) = sigmoid(w x)`` per token, or 1 without a gate. Replicated
    on all ranks like any dense layer.

    Args:
        d_model: D.
        ffn: inner width of an FFN like the routed ones, or a module called with ``x (T, D)``.
        activation: the activation of the FFN.
        bias: whether the FFN has biases.
        gate: whether to have the gate.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if the width is less than 1.
    """

    def __init__(
        self,
        d_model: int,
        ffn: int | nn.Module,
        *,
        activation: str,
        bias: bool,
        gate: bool,
        init_std: float | None,
    ) -> None:
        super().__init__()
        if not isinstance(ffn, nn.Module) and ffn < 1:
            raise ConfigError(
                f"shared_expert={ffn!r} is invalid: it must be an integer of at least 1."
            )
        self.ffn = (
            ffn
            if isinstance(ffn, nn.Module)
            else DenseFFN(d_model, ffn, activation=activation, bias=bias, init_std=init_std)
        )
        self.gate = nn.Parameter(torch.empty(1, d_model)) if gate else None
        if self.gate is not None:
            init_gate(self.gate, d_model, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """``x (T, D) -> (T, D)``."""
        y: Tensor = self.ffn(x)
        if self.gate is None:
            return y
        return y * torch.sigmoid(F.linear(x, self.gate.to(x.dtype))).to(y.dtype)


class DenseFFN(nn.Module):
    """``down act(up x)``: one FFN like those of :class:`~lightning_fastmoe.nn.StackedExperts`.

    Parameters: ``up_proj (2F, D)`` for gated activations (gate rows first), else (F, D);
    ``down_proj (D, F)``; biases ``up_bias`` and ``down_bias`` if wanted, initially zero.
    """

    def __init__(
        self, d_model: int, d_ffn: int, *, activation: str, bias: bool, init_std: float | None
    ) -> None:
        super().__init__()
        self.activation = activation
        rows = (2 if ops.is_gated(activation) else 1) * d_ffn
        self.up_proj = nn.Parameter(torch.empty(rows, d_model))
        self.down_proj = nn.Parameter(torch.empty(d_model, d_ffn))
        self.up_bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        init_gate(self.up_proj, d_model, init_std)
        init_gate(self.down_proj, d_ffn, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """``x (T, D) -> (T, D)`` in the dtype of ``x``, or autocast's."""
        up, down, up_bias, down_bias = (
            None if p is None else p.to(x.dtype)
            for p in (self.up_proj, self.down_proj, self.up_bias, self.down_bias)
        )
        assert up is not None
        assert down is not None
        h = F.linear(x, up, up_bias)
        return F.linear(ops.apply_activation(h, self.activation), down, down_bias)
