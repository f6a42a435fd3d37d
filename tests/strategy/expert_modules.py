"""Networks whose experts are modules: of one class, or of several kinds and shapes in one layer."""

from __future__ import annotations

from typing import Any

import torch
from strategy.models import D_FFN, D_IN, D_MODEL
from torch import Tensor, nn

from lightning_fastmoe import MoE

FROZEN = ("experts.1.down.bias", "experts.3.down.bias", "norm.weight")


class Plain(nn.Module):
    """Two layers and a buffer that is drawn like a weight, so that a lost one shows."""

    scale: Tensor

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.shift = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("scale", 0.5 + torch.rand(d_model))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) * self.scale + self.shift
        return y


class Gated(nn.Module):
    """Other names and shapes; as many modules and parameters, as ZeRO 3 wants on each rank."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.gate, self.out = nn.Linear(d_model, width), nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(nn.functional.silu(self.gate(x))) * self.gain
        return y


class Tied(nn.Module):
    """A matrix that goes by two names, and no modules for others."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_model, width)
        self.second = nn.Linear(d_model, width, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Parameter(torch.randn(width, d_model) / width)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(self.first(x)) * self.second(x)) @ self.out * self.gain


class Nothing(nn.Module):
    """An expert without parameters, as of MoE++."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def different(kind: type[nn.Module], num_experts: int, ragged: bool) -> list[nn.Module]:
    """Modules of two kinds by turns, of widths that differ.

    With eight experts each of up to four ranks has both kinds. If ``ragged``, the seventh has no
    parameters.
    """
    kinds: list[nn.Module] = [
        Plain(D_MODEL, 5 + 3 * i) if i % 2 else kind(D_MODEL, 4 + 2 * i) for i in range(num_experts)
    ]
    if ragged and num_experts > 6:
        kinds[6] = Nothing()
    return kinds


def without_on_the_last(last: nn.Module) -> list[nn.Module]:
    """Four experts, the last of another kind."""
    return [*(Plain(D_MODEL, D_FFN) for _ in range(3)), last]


def make_experts(experts: str, layer: int, number: int) -> Any:
    """What a layer takes as ``expert``."""
    if experts == "class":
        return Plain
    if experts == "none on one":
        return without_on_the_last(Nothing())
    if experts == "no vectors on one":
        return without_on_the_last(nn.Linear(D_MODEL, D_MODEL, bias=False))
    return different((Gated, Tied)[layer], number, experts == "ragged")


def build_modules(experts: str, num_experts: tuple[int, ...] = (4, 8)) -> nn.ModuleDict:
    """A residual network with MoE layers of ``experts``: see ``make_experts``."""
    if experts.endswith("on one"):
        num_experts = (4,)
    moes = [
        MoE(
            D_MODEL,
            D_FFN,
            e,
            top_k=1 + i % 2,
            expert=make_experts(experts, i, e),
            load_balancing=0.0,
            z_loss=0.001,
        )
        for i, e in enumerate(num_experts)
    ]
    return nn.ModuleDict(
        {
            "embed": nn.Linear(D_IN, D_MODEL),
            "norm": nn.LayerNorm(D_MODEL),
            "moes": nn.ModuleList(moes),
            "head": nn.Linear(D_MODEL, 1),
        }
    )
