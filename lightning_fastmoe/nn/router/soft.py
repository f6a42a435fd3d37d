"""Soft MoE (Puigcerver et al. 2023, "From sparse to soft mixtures of experts")."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import Router, unit_vectors
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class SoftRouter(Router):
    """Experts work on slots, each a weighted mean of a sequence's tokens; every token sees all.

    For a sequence ``X (n, D)`` and S = E * slots_per_expert slots with parameters ``Phi (S, D)``::

        L = scale * l2norm(X) l2norm(Phi)^T        (n, S), the paper's normalised form (section 2.3)
        slots = softmax over tokens of L, transposed, times X      (S, D): dispatch
        Y = (softmax over slots of L) expert(slots)                (n, D): combine

    Slot s belongs to expert ``s // slots_per_expert``. Fully differentiable; nothing to balance.
    Cost scales with the slots, not the tokens. Not causal: slots mix all tokens of a sequence.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        slots_per_expert: slots per expert and sequence.

    Raises:
        ConfigError: if ``slots_per_expert`` is less than 1.
    """

    causal: ClassVar[bool] = False
    own_capacity: ClassVar[bool] = True
    losses: ClassVar[frozenset[str]] = frozenset()
    default_losses: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, d_model: int, num_experts: int, *, slots_per_expert: int = 1) -> None:
        super().__init__(d_model, num_experts, None)
        if slots_per_expert < 1:
            raise ConfigError(
                f"slots_per_expert={slots_per_expert!r} is invalid: it must be at least 1."
            )
        self.slots_per_expert = slots_per_expert
        self.weight = nn.Parameter(torch.empty(num_experts * slots_per_expert, d_model))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new directions from torch's global generator; the scale starts at 1."""
        nn.init.normal_(self.weight)
        nn.init.ones_(self.scale)

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        groups, n = context.sequences(x.shape[0])
        directions = unit_vectors(self.weight.to(x.dtype))
        per_slot = self.scale.to(x.dtype) * (unit_vectors(x) @ directions.T)
        slots = per_slot.shape[1]
        grid = per_slot.view(groups, n, slots)
        combine = torch.softmax(grid, dim=-1)
        dispatch = torch.softmax(grid, dim=1).transpose(1, 2)
        per_expert = (x.shape[0], self.num_experts, self.slots_per_expert)
        scores = combine.reshape(per_expert).sum(dim=-1)
        ids = torch.arange(slots, device=x.device) // self.slots_per_expert
        return Routing(
            torch.logsumexp(per_slot.view(per_expert), dim=-1),
            scores,
            torch.ones(groups * slots, 1, dtype=x.dtype, device=x.device),
            ids.repeat(groups).unsqueeze(1),
            dispatch_mix=dispatch,
            combine_mix=combine,
        )
