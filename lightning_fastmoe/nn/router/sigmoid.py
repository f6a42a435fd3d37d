"""Sigmoid top-k with group-limited selection and balance bias (DeepSeek-V3, 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext
from lightning_fastmoe.nn.router.softmax import check_normalized


class SigmoidTopKRouter(LinearRouter):
    """Experts by ``s = sigmoid(x W^T)``, chosen by ``s + bias`` inside the best groups.

    The experts form G groups of E/G consecutive ids. A group's score is the sum of its two largest
    ``s + bias``; from the ``limit_groups`` best groups, the K experts with the largest ``s + bias``
    are chosen. Ties go to the larger logits, then to the lower id, for groups too. The bias affects
    only the selection::

        weights[t, k] = scale * s[t, e_k] / sum_j s[t, e_j]       (T, K)
        scores[t, e]  = s[t, e] / sum_j s[t, j]                   (T, E), for losses and metrics

    Both ratios are computed from log s, so they are right even where s underflows to zero in fp32.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        num_groups: G, a divisor of E; 1 selects among all experts.
        limit_groups: number of groups that a token may use; None for all.
        scale: factor on the weights (2.5 in DeepSeek-V3).
        normalize_weights: divide the chosen s by their sum. None: yes for K > 1.
        balance_bias: whether to have the bias, which
            :class:`~lightning_fastmoe.RouterBiasBalancing` updates.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if groups and K don't fit together.
    """

    default_losses: ClassVar[frozenset[str]] = frozenset({"load_balancing"})
    traceable: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_groups: int = 1,
        limit_groups: int | None = None,
        scale: float = 1.0,
        normalize_weights: bool | None = None,
        balance_bias: bool = True,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        limit = num_groups if limit_groups is None else limit_groups
        if num_groups < 1 or num_experts % num_groups:
            raise ConfigError(
                f"num_groups={num_groups} does not divide num_experts={num_experts}: groups are"
                " equally large."
            )
        self.num_groups, self.limit_groups, self.scale = num_groups, limit, scale
        self._normalize = normalize_weights
        if balance_bias:
            self.add_balance_bias()
        self.check_top_k(top_k)

    def check_top_k(self, top_k: int) -> None:
        """Refuses weights that would always be 1, and more experts than the groups hold."""
        check_normalized(top_k, self._normalize)
        limit, groups, size = (
            self.limit_groups,
            self.num_groups,
            self.num_experts // self.num_groups,
        )
        if not 1 <= limit <= groups or limit * size < top_k:
            raise ConfigError(
                f"limit_groups={limit} of num_groups={groups} leaves a token {limit} group(s) of"
                f" {size} expert(s): it must be in [1, {groups}] and leave at least top_k={top_k}"
                " experts."
            )

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        normalize = self.top_k > 1 if self._normalize is None else self._normalize
        if self.limit_groups == self.num_groups:
            bias = None if self.balance_bias is None else self.balance_bias.to(logits.dtype)
            routed = ops.sigmoid_top_k(logits, self.top_k, normalize, bias)
            scores, weights, expert_ids = routed
        else:
            log_s = F.logsigmoid(logits)
            scores = torch.softmax(log_s, dim=-1)
            expert_ids = self._select_in_groups(logits.detach())
            if normalize:
                weights = torch.softmax(torch.gather(log_s, 1, expert_ids), dim=-1)
            else:
                weights = torch.sigmoid(torch.gather(logits, 1, expert_ids))
        return Routing(logits, scores, self.scale * weights, expert_ids)

    def _select_in_groups(self, logits: Tensor) -> Tensor:
        s = torch.sigmoid(logits)
        if self.balance_bias is not None:
            s = s + self.balance_bias.to(s.dtype)
        in_groups = (s.shape[0], self.num_groups, -1)
        grouped = s.view(in_groups)
        size = min(2, grouped.shape[2])
        best = grouped.topk(size, dim=-1).values.sum(dim=-1)
        # For large |logits| all s round to 0 or 1; the logit of their mean still orders the groups.
        pair = logits.view(in_groups).topk(size, dim=-1).values
        mean_logit = F.logsigmoid(pair).logsumexp(dim=-1) - F.logsigmoid(-pair).logsumexp(dim=-1)
        groups = ops.top_k(best, self.limit_groups, mean_logit)
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
        limited = grouped.masked_fill(~open_groups.unsqueeze(-1), -torch.inf)
        return ops.top_k(limited.view(s.shape), self.top_k, logits)
