"""A metric for the expert loads of many layers, with one tensor as its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.monitoring.metrics.formulas import (
    dead_experts,
    drop_rate,
    load_cv,
    load_ratio,
)
from lightning_fastmoe.monitoring.metrics.routing import ExactMetric, token_entropy
from lightning_fastmoe.nn import Routing


@dataclass(frozen=True)
class LayerLoad:
    """Routing statistics of one layer.

    Attributes:
        name: the name of the layer.
        routed: (E,) fp64, pairs before any capacity.
        kept: (E,) fp64, pairs that reached their expert.
        tokens: number of tokens.
        entropy: mean over tokens, nats; see :class:`~lightning_fastmoe.metrics.RouterEntropy`.
        confidence: mean over tokens; see :class:`~lightning_fastmoe.metrics.RouterConfidence`.
    """

    name: str
    routed: Tensor
    kept: Tensor
    tokens: int
    entropy: float
    confidence: float


class ExpertLoad(ExactMetric):
    """Loads, drops, entropy and confidence of several MoE layers.

    The state is one fp64 tensor ``(layers, 2 * experts + 3)``: pairs routed to and kept by each
    expert, tokens, and the sums of the tokens' entropies and confidences. So one all-reduce
    combines the ranks, for any number of layers.

    Args:
        num_experts: E of each layer.
        names: name of each layer, used as a prefix of the computed values.
    """

    packed: Tensor

    def __init__(self, num_experts: Sequence[int], names: Sequence[str]) -> None:
        super().__init__()
        self.num_experts, self.names = list(num_experts), list(names)
        columns = 2 * max(self.num_experts, default=0) + 3
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
        row[experts : 2 * experts] += routing.kept_counts()
        row[-3] += routing.scores.shape[0]
        row[-2] += token_entropy(routing.scores).sum(dtype=torch.float64)
        row[-1] += routing.scores.amax(dim=-1).sum(dtype=torch.float64)

    def compute(self) -> dict[str, Tensor]:
        """See :meth:`summarize`."""
        return self.summarize(self.packed)

    def layers(self, packed: Tensor) -> Iterator[LayerLoad]:
        """The layers of a state that was summed over ranks; those without tokens are left out."""
        for row, experts, name in zip(packed, self.num_experts, self.names, strict=True):
            tokens = float(row[-3])
            if tokens > 0:
                yield LayerLoad(
                    name,
                    routed=row[:experts],
                    kept=row[experts : 2 * experts],
                    tokens=int(tokens),
                    entropy=float(row[-2]) / tokens,
                    confidence=float(row[-1]) / tokens,
                )

    def summarize(self, packed: Tensor) -> dict[str, Tensor]:
        """Per layer ``max_load``, ``min_load``, ``load_cv``, ``dead_experts``, ``drop_rate``,
        ``entropy`` and ``confidence``, fp32, from a state that was summed over ranks.

        The loads are load ratios: 1 is balanced, 0 is dead. A layer that saw no token is left out.
        """
        values: dict[str, Tensor] = {}
        for layer in self.layers(packed):
            ratios = load_ratio(layer.routed)
            found = {
                "max_load": ratios.max(),
                "min_load": ratios.min(),
                "load_cv": load_cv(layer.routed),
                "dead_experts": dead_experts(layer.routed),
                "drop_rate": drop_rate(layer.routed, layer.kept),
                "entropy": torch.tensor(layer.entropy),
                "confidence": torch.tensor(layer.confidence),
            }
            values |= {f"{layer.name}/{key}": value.float() for key, value in found.items()}
        return values
