"""Hash layers (Roller et al. 2021): a token's experts follow from its vocabulary id."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import Router
from lightning_fastmoe.nn.router.random import random_bits
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class HashRouter(Router):
    """The K experts with the largest ``hash(seed, token id, e)``, each with weight 1/K.

    Needs the vocabulary ids: ``moe(x, token_ids=ids)``. Nothing is learned, so routing can't
    collapse, but experts with frequent ids get more tokens. Ties, with probability 2^-63, go to the
    lower expert id.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        seed: another seed gives another assignment.
    """

    losses: ClassVar[frozenset[str]] = frozenset()
    default_losses: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, d_model: int, num_experts: int, top_k: int = 1, *, seed: int = 0) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.seed = seed

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        if context.token_ids is None:
            raise ConfigError(
                f"{context.layer}: hash routing needs the tokens' vocabulary ids. Call the layer as"
                " moe(x, token_ids=ids) with ids of the shape of x without its last dimension."
            )
        bits = random_bits(self.seed, 0, context.token_ids.to(torch.int64), self.num_experts)
        expert_ids = ops.top_k(bits, self.top_k)
        weights = torch.full_like(expert_ids, 1.0, dtype=x.dtype) / self.top_k
        logits = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device)
        scores = torch.zeros_like(logits).scatter(1, expert_ids, 1.0 / self.top_k)
        return Routing(logits, scores, weights, expert_ids)
