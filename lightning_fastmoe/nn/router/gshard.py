"""GShard's top-2 routing (Lepikhin et al. 2020), and FastMoE's DC gate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class GShardRouter(LinearRouter):
    """The two best experts; in training the second is used only with probability ``2 * weight``.

    ``scores = softmax(x W^T)``; the weights g1, g2 are the two best scores over their sum. With u
    uniform in [0, 1), the second expert is used in training if ``2 * g2 > u``, and always in
    evaluation. A second expert that isn't used contributes zero and counts as not routed. The
    layer's capacity factors default to FastMoE's 1.2 in training and 2.4 in evaluation. The
    load-balancing losses count only first choices (c_e of the paper's algorithm 1).

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model, at least 2.
        top_k: 2.
        random_second: False always uses the second expert.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is not 2.
    """

    random: ClassVar[bool] = True
    capacity_factors = (1.2, 2.4)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        random_second: bool = True,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        self.check_top_k(top_k)
        self.random_second = random_second

    def check_top_k(self, top_k: int) -> None:
        """Refuses all but 2."""
        if top_k != 2:
            raise ConfigError(
                f"top_k={top_k} doesn't fit GShard routing, which uses two experts per token. Use"
                " top_k=2, or router='softmax'."
            )

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        routed = ops.softmax_top_k(logits, self.top_k, True)
        routing = Routing(logits, *routed, balanced_slots=1)
        if not (context.training and self.random_second):
            return routing
        second = routing.weights.detach()[:, 1:]
        active = torch.cat(
            [torch.ones_like(second, dtype=torch.bool), 2 * second > context.uniform(logits, 1)],
            dim=1,
        )
        return routing._replace(active=active)


class DCRouter(GShardRouter):
    """FastMoE's DC gate: GShard's routing with capacity over the tokens of all ranks.

    "Distributed capacity": an expert's capacity is computed over the global batch and filled in
    rank order, so that a rank with many tokens for an expert may use slots that other ranks don't
    need. In this package that is ``MoE(capacity_over="global")``, which works with any router; this
    class is the GShard router with that default.
    """

    capacity_over = "global"
