"""How many tokens an expert takes, and who is dropped."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.global_batch import GlobalBatch
from lightning_fastmoe.nn.router.base import Routing

CapacityOver = Literal["rank", "global"]
DropBy = Literal["position", "score"]
CapacityFactors = float | tuple[float | None, float | None] | list[float | None] | None


def check_factor(name: str, value: float | None) -> float | None:
    """Returns ``value``.

    Raises:
        ConfigError: if it is neither None nor a positive finite number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise ConfigError(
            f"{name}={value!r} is invalid: it must be a positive finite number, or None for"
            " dropless."
        )
    return value


def check_options(**options: str) -> None:
    """Refuses unknown values of ``capacity_over`` and ``drop_by``.

    Raises:
        ConfigError: for an unknown value.
    """
    known = {"capacity_over": get_args(CapacityOver), "drop_by": get_args(DropBy)}
    for name, value in options.items():
        if value not in known[name]:
            raise ConfigError(
                f"{name}={value!r} is unknown. It must be one of: {', '.join(known[name])}."
            )


def expert_capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """``C = ceil(factor * K * T / E)``: slots per expert."""
    return math.ceil(factor * top_k * tokens / num_experts)


def limit_by_capacity(
    routing: Routing,
    factor: float,
    *,
    over: CapacityOver,
    by: DropBy,
    batch: GlobalBatch,
    layer: str,
) -> Routing:
    """Keeps at most C pairs of each expert; sets ``kept``.

    All first choices come before all second ones (GShard). Among the k-th choices come first: the
    earlier tokens (``by="position"``; over all ranks in rank order), or those with the largest best
    score (``by="score"``: batch-prioritised routing, Riquelme et al. 2021).

    Args:
        routing: token choice.
        factor: C is :func:`expert_capacity` of it.
        over: whose tokens share the C slots: this rank's, or the global batch's. "global" exchanges
            counts (by position) or all choices (by score) between ranks.
        by: see above.
        batch: reaches the other ranks.
        layer: for errors.
    """
    ids, num_experts = routing.expert_ids, routing.logits.shape[1]
    if routing.active is not None:
        ids = ids.masked_fill(~routing.active, num_experts)
    tokens, top_k = ids.shape
    best = None
    if by == "score":
        best = torch.gather(routing.scores.detach(), 1, routing.expert_ids).amax(dim=1)
    if over == "rank":
        capacity = expert_capacity(factor, tokens, top_k, num_experts)
        within = positions_in_expert(ids, num_experts, best) < capacity
    elif best is None:
        within = _globally_by_position(ids, num_experts, factor, batch, layer)
    else:
        # fp64 holds ids and scores alike.
        packed = torch.cat([ids.to(torch.float64), best.to(torch.float64).unsqueeze(1)], dim=1)
        everyone, start = batch.gather_rows(packed, layer)
        all_ids, all_best = everyone[:, :-1].to(torch.int64), everyone[:, -1]
        capacity = expert_capacity(factor, len(everyone), top_k, num_experts)
        position = positions_in_expert(all_ids, num_experts, all_best)
        within = position[start : start + tokens] < capacity
    return routing._replace(kept=within & (ids < num_experts))


def positions_in_expert(ids: Tensor, num_experts: int, priority: Tensor | None) -> Tensor:
    """How many pairs come before each pair in the queue of its expert.

    Args:
        ids: (T, K), E for a slot that isn't used.
        num_experts: E.
        priority: (T,), larger first, ties to the earlier token; None for the order of tokens.

    Returns:
        (T, K) int64.
    """
    tokens, top_k = ids.shape
    queue = ids
    if priority is not None:
        by_priority = torch.sort(priority, descending=True, stable=True).indices
        queue = ids.index_select(0, by_priority)
    flat = queue.T.reshape(-1)  # first choices, then second ones
    order = ops.order_by_expert(flat, num_experts + 1)
    starts = order.offsets.to(torch.int64) - order.tokens_per_expert
    place = (order.inverse - starts[flat]).view(top_k, tokens).T
    if priority is None:
        return place
    return torch.empty_like(place).index_copy(0, by_priority, place)


def _globally_by_position(
    ids: Tensor, num_experts: int, factor: float, batch: GlobalBatch, layer: str
) -> Tensor:
    tokens, top_k = ids.shape
    experts = torch.arange(num_experts + 1, device=ids.device)
    own = torch.stack(
        [
            torch.zeros_like(experts).scatter_add_(0, ids[:, k], torch.ones_like(ids[:, k]))
            for k in range(top_k)
        ]
    )  # (K, E + 1)
    sizes = torch.full((1,), tokens, dtype=torch.int64, device=ids.device)
    table = batch.gather_counts(torch.cat([own.reshape(-1), sizes]), layer)
    total = int(table[:, -1].sum()) if batch.size > 1 else tokens
    by_rank = table[:, :-1].view(-1, top_k, num_experts + 1).to(ids.device)
    everyone = by_rank.sum(dim=0)
    # Before this rank's k-th choices: everyone's earlier choices, and lower ranks' k-th ones.
    earlier = everyone.cumsum(dim=0) - everyone
    ahead = earlier + by_rank[: batch.rank].sum(dim=0) - (own.cumsum(dim=0) - own)
    capacity = expert_capacity(factor, total, top_k, num_experts)
    position = positions_in_expert(ids, num_experts, None)
    return position + torch.gather(ahead, 1, ids.T).T < capacity
