"""Expert capacity: how many tokens an expert takes, and which are dropped."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.global_batch import GlobalBatch
from lightning_fastmoe.nn.router import Routing, RoutingContext
from lightning_fastmoe.nn.router.traits import RouterTraits

CapacityOver = Literal["rank", "global"]
DropBy = Literal["position", "score"]
CapacityFactors = float | tuple[float | None, float | None] | list[float | None] | None


class Capacity:
    """The capacity of one layer's experts.

    Attributes may be changed between passes, identically on all ranks.

    Attributes:
        in_graphs: the factors of training and of evaluation, each (1,) fp64 on the CPU: one that is
            a number would be compiled into a graph, and a schedule would ask for a graph per step.
        is_limited: whether each is a number at all.

    Args:
        traits: the traits of the layer's router, whose factors are used for "router".
        factors: the capacity factor, see :func:`expert_capacity`: a number, a pair (training,
            evaluation), None for dropless, or "router".
        over: whose tokens share the C slots, this rank's or the global batch's; None is the
            router's default.
        drop_by: see :func:`limit_by_capacity`.

    Raises:
        ConfigError: if an argument is unknown, out of range, or not applicable to the router.
    """

    def __init__(
        self,
        traits: RouterTraits,
        factors: CapacityFactors | str,
        over: str | None,
        drop_by: str,
    ) -> None:
        self._training, self._evaluation = _pair(factors, traits)
        for factor in (self._training, self._evaluation):
            check_factor("capacity_factor", factor, traits)
        self.in_graphs = [torch.zeros(1, dtype=torch.float64, device="cpu") for _ in range(2)]
        self._fill()
        self.over = traits.capacity_over if over is None else over
        self.drop_by = drop_by

    @property
    def over(self) -> str:
        """Whose tokens share an expert's slots: the "rank" or the "global" batch's."""
        return self._over

    @over.setter
    def over(self, value: str) -> None:
        _check_one_of("capacity_over", value, get_args(CapacityOver))
        self._over = value

    @property
    def drop_by(self) -> str:
        """Which tokens are kept: by "position" or by "score"."""
        return self._drop_by

    @drop_by.setter
    def drop_by(self, value: str) -> None:
        _check_one_of("drop_by", value, get_args(DropBy))
        self._drop_by = value

    def factor(self, *, training: bool) -> float | None:
        """The factor in training or evaluation; None is dropless."""
        return self._training if training else self._evaluation

    def set_factor(self, value: float | None, traits: RouterTraits, *, training: bool) -> None:
        """Sets the factor of training or of evaluation.

        Raises:
            ConfigError: as :func:`check_factor` does.
        """
        name = "capacity_factor" if training else "eval_capacity_factor"
        check_factor(name, value, traits)
        if training:
            self._training = value
        else:
            self._evaluation = value
        self._fill()

    def _fill(self) -> None:
        factors = self._training, self._evaluation
        self.is_limited = [factor is not None for factor in factors]
        for tensor, factor in zip(self.in_graphs, factors, strict=True):
            tensor.fill_(0.0 if factor is None else factor)

    @property
    def uses_batch(self) -> bool:
        """Whether passes exchange counts with the other ranks."""
        return self.over == "global" and (self._training, self._evaluation) != (None, None)

    def limit(self, routing: Routing, context: RoutingContext, traits: RouterTraits) -> Routing:
        """The routing with ``kept`` set to the pairs that the experts have room for.

        Raises:
            ConfigError: if the router doesn't choose K experts per token.
        """
        factor = context.capacity_factor
        if factor is None or traits.own_capacity:
            return routing
        if routing.token_ids is not None or routing.dispatch_mix is not None:
            raise ConfigError(
                f"{context.layer}: capacity_factor={factor} limits token choice, but"
                f" {traits.name} does not choose K experts per token. Drop it, or"
                " set own_capacity = True in the router's class and act on the context's factor."
            )
        return limit_by_capacity(
            routing,
            factor,
            over=self.over,
            by=self.drop_by,
            batch=context.batch,
            layer=context.layer,
        )


def _pair(given: CapacityFactors | str, traits: RouterTraits) -> tuple[float | None, float | None]:
    if isinstance(given, str):
        if given != "router":
            raise ConfigError(
                f"capacity_factor={given!r} is unknown: give a number, a pair (training,"
                " evaluation), None for dropless, or 'router' for the router's own."
            )
        return traits.capacity_factors
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2:
        raise ConfigError(
            f"capacity_factor={given!r} is invalid: a pair is (training, evaluation)."
        )
    return pair


def check_factor(name: str, value: float | None, traits: RouterTraits) -> None:
    """Refuses a capacity factor that is out of range or not applicable to the router.

    Raises:
        ConfigError: if it is neither None nor a positive finite number; for expert choice without a
            factor, or Soft MoE with one.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise ConfigError(
            f"{name}={value!r} is invalid: it must be a positive finite number, or None for"
            " dropless."
        )
    if not traits.own_capacity:
        return
    needs = traits.capacity_factors[0] is not None
    if needs != (value is not None):
        raise ConfigError(
            f"capacity_factor={value!r} doesn't suit {traits.name}: "
            + (
                "its experts take that many times T/E tokens, so it must be a number."
                if needs
                else "it drops nothing and takes none. Drop the argument."
            )
        )


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown. It must be one of: {', '.join(known)}.")


def expert_capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """``C = ceil(factor * K * T / E)``: slots per expert."""
    return math.ceil(factor * top_k * tokens / num_experts)


def limit_by_capacity(
    routing: Routing,
    factor: float,
    *,
    over: str,
    by: str,
    batch: GlobalBatch,
    layer: str,
) -> Routing:
    """Keeps at most C pairs of each expert; sets ``kept``.

    All first choices come before all second ones (GShard). Among the k-th choices, priority goes to
    earlier tokens (``by="position"``; over all ranks in rank order), or to tokens with the largest
    best score (``by="score"``: batch-prioritised routing, Riquelme et al. 2021).

    Args:
        routing: token choice.
        factor: the capacity factor, see :func:`expert_capacity`.
        over: whose tokens share the C slots: this rank's, or the global batch's. "global" exchanges
            counts (by position) or all choices (by score) between ranks.
        by: see above.
        batch: access to the other ranks' tokens.
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
        # fp64 holds both ids and scores exactly.
        packed = torch.cat([ids.to(torch.float64), best.to(torch.float64).unsqueeze(1)], dim=1)
        everyone, start = batch.gather_rows(packed, layer)
        all_ids, all_best = everyone[:, :-1].to(torch.int64), everyone[:, -1]
        capacity = expert_capacity(factor, len(everyone), top_k, num_experts)
        position = positions_in_expert(all_ids, num_experts, all_best)
        within = position[start : start + tokens] < capacity
    return routing._replace(kept=within & (ids < num_experts))


def positions_in_expert(ids: Tensor, num_experts: int, priority: Tensor | None) -> Tensor:
    """How many pairs come before each pair in its expert's queue.

    Args:
        ids: (T, K), E for an unused slot.
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
    # Ahead of this rank's k-th choices: all ranks' earlier choices, and lower ranks' k-th ones.
    earlier = everyone.cumsum(dim=0) - everyone
    ahead = earlier + by_rank[: batch.rank].sum(dim=0) - (own.cumsum(dim=0) - own)
    capacity = expert_capacity(factor, total, top_k, num_experts)
    position = positions_in_expert(ids, num_experts, None)
    return position + torch.gather(ahead, 1, ids.T).T < capacity
