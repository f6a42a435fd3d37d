"""torchmetrics metrics of what routers do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fastmoe.nn import Routing


class ExpertLoad(Metric):
    """Load of the experts of several MoE layers, and the routers' entropy.

    The state is one fp64 tensor ``(layers, experts + 2)``: tokens per expert, tokens, and the sum
    of the tokens' entropies. So ranks are combined by one all-reduce, whatever the layers.

    Args:
        num_experts: E of each layer.
        names: name of each layer, used as a prefix of the computed values.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    packed: Tensor

    def __init__(self, num_experts: Sequence[int], names: Sequence[str]) -> None:
        super().__init__()
        self.num_experts, self.names = list(num_experts), list(names)
        columns = max(self.num_experts, default=0) + 2
        self.add_state(
            "packed",
            torch.zeros(len(self.names), columns, dtype=torch.float64),
            dist_reduce_fx="sum",
        )

    def update(self, layer: int, routing: Routing) -> None:
        """Adds the tokens of one forward pass of layer number ``layer``. No host sync."""
        experts = self.num_experts[layer]
        row = self.packed[layer]
        row[:experts] += routing.routed_counts()
        row[-2] += routing.scores.shape[0]
        row[-1] += torch.special.entr(routing.scores).sum()

    def compute(self) -> dict[str, Tensor]:
        """Per layer: ``max_load``, ``min_load``, ``load_cv``, ``dead_experts``, ``entropy``."""
        return self.summarize(self.packed)

    def summarize(self, packed: Tensor) -> dict[str, Tensor]:
        """The values of :meth:`compute` from a state that was summed over ranks.

        Load ratios are an expert's load over the mean load: 1 is balanced, 0 is dead. ``load_cv``
        is the standard deviation of the load ratios. ``entropy`` is the mean entropy of a token's
        scores in nats, at most ``log E``. A layer that saw no token is left out.
        """
        values: dict[str, Tensor] = {}
        for row, experts, name in zip(packed, self.num_experts, self.names, strict=True):
            if row[-2] == 0:
                continue
            load = load_ratio(row[:experts])
            values[f"{name}/max_load"] = load.max()
            values[f"{name}/min_load"] = load.min()
            values[f"{name}/load_cv"] = load.std(correction=0)
            values[f"{name}/dead_experts"] = (load == 0).sum()
            values[f"{name}/entropy"] = row[-1] / row[-2]
        return {name: value.float() for name, value in values.items()}


def load_ratio(tokens_per_expert: Tensor) -> Tensor:
    """An expert's load over the mean load, ``(E,) -> (E,)``; zeros if there are no tokens."""
    mean = tokens_per_expert.double().mean()
    return tokens_per_expert / mean.clamp_min(torch.finfo(torch.float64).tiny)
