"""FasterMoE's topology-aware gate (He et al. 2022), which limits how many tokens leave the node."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class TopologyAwareRouter(LinearRouter):
    """Top-k routing in which only a fraction of a rank's tokens may use experts of other nodes.

    Of the tokens whose K best experts are not all on the rank's own node, the
    ``floor(outgoing_fraction * T)`` with the largest logit of a remote expert keep their choice
    (ties to the earlier token); the others take the K best experts on the node. Weights: softmax
    over the K chosen logits, for K = 1 the score. FasterMoE's gate limits first choices; here the
    limit covers all K.

    Which experts are near depends on the ranks, so the same model routes differently on other
    topologies; if all experts are on one node, this is softmax top-k. Evaluation is limited too.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        outgoing_fraction: the share of tokens that may leave the node; FasterMoE's default is 0.14.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if the fraction is outside [0, 1].
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        outgoing_fraction: float = 0.14,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        if not 0 <= outgoing_fraction <= 1:
            raise ConfigError(
                f"outgoing_fraction={outgoing_fraction!r} is out of range: choose it in [0, 1]."
            )
        self.outgoing_fraction = outgoing_fraction

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        scores = torch.softmax(logits, dim=-1)
        near = context.batch.near_experts(self.num_experts)
        expert_ids = ops.top_k(logits.detach(), self.top_k)
        if not bool(near.all()):
            if int(near.sum()) < self.top_k:
                raise ConfigError(
                    f"{context.layer}: top_k={self.top_k}, but this rank's node holds"
                    f" {int(near.sum())} of the {self.num_experts} experts. A token that stays"
                    " needs top_k experts on its node: use a smaller expert_parallel_size or top_k."
                )
            expert_ids = self._limit(logits.detach(), expert_ids, near.to(x.device))
        weights = torch.gather(logits, 1, expert_ids)
        if self.top_k > 1:
            weights = torch.softmax(weights, dim=-1)
        else:
            weights = torch.gather(scores, 1, expert_ids)
        return Routing(logits, scores, weights, expert_ids)

    def _limit(self, logits: Tensor, expert_ids: Tensor, near: Tensor) -> Tensor:
        budget = int(self.outgoing_fraction * logits.shape[0])
        away = ~near[expert_ids]
        wish = torch.gather(logits, 1, expert_ids).masked_fill(~away, -torch.inf).amax(dim=1)
        # Tokens that stay anyway get -inf: their K best near experts are their K best of all.
        first = ops.top_k(wish.unsqueeze(0), budget)[0]
        let_go = torch.zeros_like(wish, dtype=torch.bool).index_fill(0, first, True)
        at_home = ops.top_k(logits.masked_fill(~near, -torch.inf), expert_ids.shape[1])
        return torch.where(let_go.unsqueeze(1), expert_ids, at_home)
