"""Expert choice routing (Zhou et al. 2022): experts choose tokens."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the C tokens that score it highest, so load is even by construction.

    ``scores = softmax(x W^T)`` over the experts; expert e takes the ``C = ceil(capacity_factor *
    n / E)`` tokens with the largest ``scores[:, e]`` (ties to the earlier token), at most n, among
    the n tokens of one sequence or of the rank's whole batch; a token's weight is that score. A
    token may be taken by any number of experts, or by none: then its output is zero. The layer's
    ``capacity_factor`` is the mean number of experts per token, and may be changed between steps.

    Not causal: whether a token is taken depends on later ones.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        over: "sequence" or "rank", the tokens that an expert chooses from.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``over`` is unknown.
    """

    causal: ClassVar[bool] = False
    own_capacity: ClassVar[bool] = True
    losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})
    default_losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})
    capacity_factors = (2.0, 2.0)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        over: Literal["sequence", "rank"] = "sequence",
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, None, init_std)
        if over not in ("sequence", "rank"):
            raise ConfigError(f"over={over!r} is unknown. It must be 'sequence' or 'rank'.")
        self.over = over

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        tokens, experts = x.shape[0], self.num_experts
        groups, n = (1, tokens) if self.over == "rank" else context.sequences(tokens)
        factor = context.capacity_factor
        if factor is None:
            factor = self.capacity_factors[0]
        assert factor is not None
        taken = min(n, math.ceil(factor * n / experts))
        logits = self.logits(x)
        scores = torch.softmax(logits, dim=-1)
        # (G, E, n): each expert ranks the tokens of a group.
        by_expert = scores.view(groups, n, experts).transpose(1, 2)
        # Logarithms still order the tokens where scores underflow to zero.
        log_scores = torch.log_softmax(logits.detach(), dim=-1)
        ranked = log_scores.view(groups, n, experts).transpose(1, 2)
        picked = ops.top_k(ranked.reshape(groups * experts, n), taken)
        picked = picked.view(groups, experts, taken)
        start = torch.arange(groups, device=x.device).view(-1, 1, 1) * n
        token_ids = (picked + start).reshape(-1)
        expert_ids = torch.arange(experts, device=x.device).view(1, -1, 1).expand_as(picked)
        weights = torch.gather(by_expert, 2, picked).reshape(-1)
        return Routing(
            logits, scores, weights, expert_ids.reshape(-1).contiguous(), token_ids=token_ids
        )
