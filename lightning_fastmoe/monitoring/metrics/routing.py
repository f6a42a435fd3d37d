"""Metrics of one MoE layer's routing: load, drops, entropy, confidence, co-activation.

Each state is a sum over tokens, so metrics are exact over ranks with different numbers of tokens
(states are added, not averaged), micro-batches and epochs. Replays by activation checkpointing call
no observer, so they don't count twice; masked tokens don't reach the router, so they don't count.
Updates never sync with the device.

Example::

    self.dead = DeadExperts(num_experts=8)        # in __init__ of a LightningModule
    self.dead.observe(self.moe)                   # once the layer exists
    self.log("dead", self.dead, on_epoch=True)    # in training_step; Lightning resets it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.metrics.formulas import (
    dead_experts,
    drop_rate,
    load_cv,
    load_ratio,
)
from lightning_fastmoe.nn import Routing
from lightning_fastmoe.nn.expert_layers import ExpertLayer


class ExactMetric(Metric):
    """A metric whose states keep their dtypes when the module around it is cast.

    bf16 sums would stop growing at 256.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False

    def _apply(self, fn: Any, exclude_state: Any = "") -> ExactMetric:
        before = {name: getattr(self, name) for name in self._defaults}
        defaults = dict(self._defaults)
        super()._apply(fn, exclude_state)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
                default = defaults[name]
                assert isinstance(default, Tensor)
                self._defaults[name] = default.to(new.device)
                self._computed = None  # it was cast too
        return self


class RoutingMetric(ExactMetric):
    """Base class: a metric of one layer's routing.

    Args:
        num_experts: E of the layer.

    Raises:
        ConfigError: if ``num_experts`` is less than 1.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts} is invalid: it must be at least 1.")
        self.num_experts = num_experts

    def observe(self, layer: ExpertLayer, training: bool = True) -> RemovableHandle:
        """Updates with each forward pass of ``layer``, until the handle is removed.

        Args:
            layer: a layer with the same number of experts as this metric.
            training: whether to observe training passes, or else evaluation passes.

        Raises:
            ConfigError: if the layer has a different number of experts.
        """
        if layer.num_experts != self.num_experts:
            raise ConfigError(
                f"{type(self).__name__}(num_experts={self.num_experts}) can't observe a layer with"
                f" {layer.num_experts} experts. Give both the same number."
            )

        def update(layer: ExpertLayer, routing: Routing) -> None:
            if layer.training == training:
                self.update(routing)

        return layer.register_routing_observer(update)

    def _sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class _RoutedCounts(RoutingMetric):
    """Base of metrics computed from routed pairs, before any capacity."""

    routed: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self._sum("routed", num_experts)

    def update(self, routing: Routing) -> None:
        """Adds one forward pass."""
        self.routed += routing.routed_counts()


class LoadRatio(_RoutedCounts):
    """``E * n[e] / sum(n)`` for each expert, (E,) fp64; ``n[e]`` counts pairs before any capacity.

    1 is balanced, 0 is dead, E is all tokens on one expert.
    """

    def compute(self) -> Tensor:
        """(E,) fp64; zeros without tokens."""
        return load_ratio(self.routed)


class LoadCV(_RoutedCounts):
    """``std(n) / mean(n)`` over the experts (population standard deviation), a scalar.

    0 is balanced, ``sqrt(E - 1)`` is all tokens on one expert.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar fp64; 0 without tokens."""
        return load_cv(self.routed)


class DeadExperts(_RoutedCounts):
    """``sum over e of [n[e] = 0]``: experts that no token chose since the last reset."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar int64; E without tokens."""
        return dead_experts(self.routed)


class DropRate(RoutingMetric):
    """``1 - kept / routed``: the fraction of (token, expert) pairs that were dropped.

    0 for dropless layers, and for routers with their own capacity (expert choice).
    """

    higher_is_better = False
    pairs: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self._sum("pairs", 2)

    def update(self, routing: Routing) -> None:
        """Adds one forward pass."""
        self.pairs += torch.stack([routing.routed_counts().sum(), routing.kept_counts().sum()])

    def compute(self) -> Tensor:
        """Scalar fp64; 0 without pairs."""
        return drop_rate(self.pairs[:1], self.pairs[1:])


class _MeanOverTokens(RoutingMetric):
    total: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self._sum("total", dtype=torch.float64)
        self._sum("tokens")

    def update(self, routing: Routing) -> None:
        """Adds one forward pass."""
        self.total += self.of_tokens(routing.scores).sum(dtype=torch.float64)
        self.tokens += routing.scores.shape[0]

    def of_tokens(self, scores: Tensor) -> Tensor:
        """The quantity of each token, (T, E) -> (T,)."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Scalar fp64; NaN without tokens."""
        return self.total / self.tokens


class RouterEntropy(_MeanOverTokens):
    """``mean over tokens of -sum over e of p[e] log p[e]``, in nats, for the router's scores p.

    From 0 (each token is sure of one expert) to ``log E`` (no preference). Routers whose scores are
    zero outside the chosen experts (noisy top-k) can't exceed ``log K``.
    """

    def of_tokens(self, scores: Tensor) -> Tensor:
        """(T, E) -> (T,)."""
        return token_entropy(scores)


class RouterConfidence(_MeanOverTokens):
    """``mean over tokens of max over e of p[e]``: the score of each token's best expert.

    From ``1 / E`` (no preference) to 1.
    """

    def of_tokens(self, scores: Tensor) -> Tensor:
        """(T, E) -> (T,)."""
        return scores.amax(dim=-1)


class ExpertCoActivation(RoutingMetric):
    """``P[i, j] = tokens that chose i and j / tokens that chose i``, as in OLMoE (2024), (E, E).

    The diagonal is 1, rows of experts without tokens are NaN. Under balanced, independent choices
    the rest is near ``(K - 1) / (E - 1)``; larger values show experts that act as one. Choices are
    counted before any capacity. Soft MoE activates all experts for every token. An update
    multiplies two (T, E) matrices.
    """

    together: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self._sum("together", num_experts, num_experts)

    def update(self, routing: Routing) -> None:
        """Adds one forward pass; exact for up to 2^24 tokens in a pass."""
        chosen = chosen_experts(routing)
        # Autocast would round the counts to bf16.
        with torch.autocast(chosen.device.type, enabled=False):
            self.together += (chosen.T @ chosen).to(torch.int64)

    def compute(self) -> Tensor:
        """(E, E) fp64."""
        counts = self.together.double()
        share: Tensor = counts / counts.diagonal().unsqueeze(1)
        return share


def token_entropy(scores: Tensor) -> Tensor:
    """Entropy of each row in nats, (T, E) -> (T,)."""
    entropy: Tensor = torch.special.entr(scores).sum(dim=-1)
    return entropy


def chosen_experts(routing: Routing) -> Tensor:
    """(T, E) fp32: 1 where the token chose the expert, 0 elsewhere."""
    tokens, experts = routing.scores.shape
    chosen = torch.zeros(tokens, experts + 1, device=routing.scores.device)
    if routing.dispatch_mix is not None:
        return chosen[:, :experts] + 1.0
    if routing.token_ids is not None:
        chosen[routing.token_ids, routing.expert_ids] = 1.0
        return chosen[:, :experts]
    ids = routing.expert_ids
    if routing.active is not None:
        ids = ids.masked_fill(~routing.active, experts)
    return chosen.scatter_(1, ids, 1.0)[:, :experts]
