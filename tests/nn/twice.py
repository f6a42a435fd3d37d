"""Layers that run twice, and gradients of them that are differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid"},
    "noisy": {"router": "noisy"},
    "switch": {"router": "switch", "top_k": 1},
    "cosine": {"router": "cosine"},
    "biases": {"bias": True, "activation": "gelu"},
    "capacity": {"capacity_factor": 0.7},
    "shared": {"shared_expert": 8, "shared_expert_gate": True},
}


class Twice(nn.Module):
    """A layer that runs twice, so that its second tokens depend on all that it has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x + torch.tanh(self.layer(x)))
        return y


def gradients(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Those of a loss without and with a graph, and those of the norm of the tokens' gradient."""
    leaves = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}

    def of(value: Tensor, **options: Any) -> dict[str, Tensor]:
        options |= {"allow_unused": True, "materialize_grads": True}
        return dict(
            zip(leaves, torch.autograd.grad(value, leaves.values(), **options), strict=True)
        )

    plain = of(model(x).square().sum())
    first = of(model(x).square().sum(), create_graph=True)
    return [plain, {n: g.detach() for n, g in first.items()}, of(first["x"].square().sum())]
