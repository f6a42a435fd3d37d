"""Networks whose experts are modules: of one class, or of several kinds and shapes in one layer."""

from __future__ import annotations

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
        self.register_buffer("scale", 0.5 + torch.rand(d_model))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) * self.scale
        return y


class Tied(nn.Module):
    """Other names, other shapes, and a matrix that goes by two names."""

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


def different(num_experts: int) -> list[nn.Module]:
    """Modules of two kinds, of widths that differ; the seventh has no parameters."""
    kinds: list[nn.Module] = [
        Plain(D_MODEL, 5 + 3 * i) if i % 2 else Tied(D_MODEL, 4 + 2 * i) for i in range(num_experts)
    ]
    if num_experts > 6:
        kinds[6] = Nothing()
    return kinds


def build_modules(experts: str, num_experts: tuple[int, ...] = (4, 8)) -> nn.ModuleDict:
    """A residual network with MoE layers of ``experts``: "class" or "list"."""
    moes = [
        MoE(
            D_MODEL,
            D_FFN,
            e,
            top_k=1 + i % 2,
            expert=Plain if experts == "class" else different(e),
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
