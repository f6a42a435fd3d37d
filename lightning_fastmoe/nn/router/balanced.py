"""Balanced assignment: BASE layers (Lewis et al. 2021) and Sinkhorn (Clark et al. 2022)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.noisy import check_at_least
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext

Over = Literal["rank", "global"]

_FINEST_TOLERANCE = 1e-12
"""Smallest relative bid increment that still changes fp64 prices in the auction."""


class BaseRouter(LinearRouter):
    """BASE routing: in training, the equal split of tokens over experts with the largest logits.

    ``logits = x W^T``; the assignment a maximises ``sum_t logits[t, a(t)]`` under the constraint
    that every expert gets T/E of the T tokens (the first ``T mod E`` experts get one more). It is
    found by an auction (Bertsekas) up to ``T * tolerance`` times the range of the logits. In
    evaluation each token goes to its best expert. The weight is ``sigmoid(logits[t, a(t)])``.

    In training the assignment uses the whole batch: either this rank's, so that it depends on the
    number of ranks, or the global one, whose logits every rank then gathers. The auction reads from
    the device in every round: on GPUs :class:`SinkhornRouter` gets a similar balance faster.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: 1.
        tolerance: the tolerance of the assignment, relative to the range of the logits.
        over: whether the T tokens are those of this "rank" or of the "global" batch.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is not 1, ``tolerance`` not positive, or ``over`` unknown.
    """

    losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})
    default_losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        tolerance: float = 1e-3,
        over: Over = "rank",
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        self.check_top_k(top_k)
        if not tolerance > 0:
            raise ConfigError(f"tolerance={tolerance!r} is invalid: it must be above 0.")
        self.tolerance, self.over = tolerance, check_over(over)
        self.uses_batch = over == "global"

    def check_top_k(self, top_k: int) -> None:
        """Refuses all but 1."""
        if top_k != 1:
            raise ConfigError(
                f"top_k={top_k} doesn't fit BASE routing, which assigns one expert: use 1."
            )

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        if context.training:
            everyone, start = batch_logits(logits, self.over, context)
            assigned = balanced_assignment(everyone, self.tolerance)
            expert_ids = assigned[start : start + x.shape[0]].unsqueeze(1)
        else:
            expert_ids = ops.top_k(logits.detach(), 1)
        weights = torch.sigmoid(torch.gather(logits, 1, expert_ids))
        return Routing(logits, torch.softmax(logits, dim=-1), weights, expert_ids)


class SinkhornRouter(LinearRouter):
    """Top-k of logits shifted so that soft loads are even (S-BASE), by matrix scaling.

    In training ``iterations`` rounds of Sinkhorn's algorithm find row factors a and column factors
    b such that ``exp(logits + a + b)`` has rows of sum 1 and columns of sum T/E over T tokens, and
    the K largest entries of each row are chosen; in evaluation, the K largest logits. Weights:
    ``sigmoid`` of the chosen logit for K = 1, softmax over the chosen logits for K > 1.

    In training the choice uses the whole batch: either this rank's, without a host sync, so that it
    depends on the number of ranks; or the global one, whose logits every rank then gathers.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        iterations: rounds of Sinkhorn's algorithm.
        over: whether the T tokens are those of this "rank" or of the "global" batch.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is out of range, ``iterations`` less than 1, or ``over`` unknown.
    """

    losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})
    default_losses: ClassVar[frozenset[str]] = frozenset({"z_loss"})

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        iterations: int = 8,
        over: Over = "rank",
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        check_at_least(iterations=(iterations, 1))
        self.iterations, self.over = iterations, check_over(over)
        self.uses_batch = over == "global"

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        plan = logits.detach()
        if context.training:
            everyone, _ = batch_logits(logits, self.over, context)
            if everyone.shape[0]:
                plan = plan + sinkhorn_shift(everyone, self.iterations)
        expert_ids = ops.top_k(plan, self.top_k)
        chosen = torch.gather(logits, 1, expert_ids)
        weights = torch.sigmoid(chosen) if self.top_k == 1 else torch.softmax(chosen, dim=-1)
        return Routing(logits, torch.softmax(logits, dim=-1), weights, expert_ids)


def check_over(over: Over) -> Over:
    """Returns ``over``.

    Raises:
        ConfigError: if it is unknown.
    """
    if over not in ("rank", "global"):
        raise ConfigError(f"over={over!r} is unknown. It must be 'rank' or 'global'.")
    return over


def batch_logits(logits: Tensor, over: Over, context: RoutingContext) -> tuple[Tensor, int]:
    """The logits of all tokens that are assigned together, and the row where this rank's begin.

    Args:
        logits: (T, E) of this rank.
        over: see the routers.
        context: the context of the pass.

    Returns:
        ``(T', E)`` without gradients, and a row number.
    """
    if over == "rank":
        return logits.detach(), 0
    return context.batch.gather_rows(logits.detach(), context.layer)


def sinkhorn_shift(logits: Tensor, iterations: int) -> Tensor:
    """The column factors b of :class:`SinkhornRouter`, ``logits (T, E) -> (E,)``."""
    tokens, experts = logits.shape
    # Row shifts don't change the plan, and this rounds the differences, not the large values.
    logits = logits - logits.amax(dim=1, keepdim=True)
    shift = torch.zeros(experts, dtype=logits.dtype, device=logits.device)
    for _ in range(iterations):
        rows = -torch.logsumexp(logits + shift, dim=1, keepdim=True)
        shift = math.log(tokens / experts) - torch.logsumexp(logits + rows, dim=0)
    return shift


def balanced_assignment(scores: Tensor, tolerance: float) -> Tensor:
    """Assigns equally many tokens to each expert, with nearly the largest sum of scores.

    An auction with falling bid increments: unassigned tokens bid for the expert that is worth most
    to them at its price; each expert keeps its highest bids. Ties go to the earlier token and the
    lower expert id.

    Args:
        scores: (T, E).
        tolerance: the sum is within ``T * tolerance`` times the range of the scores.

    Returns:
        (T,) int64.
    """
    tokens, experts = scores.shape
    if experts == 1 or tokens == 0:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    value = torch.nan_to_num(scores.to(torch.float64))
    value = value - value.min()  # only differences count, and large numbers would round them
    ids = torch.arange(experts, device=scores.device)
    room = tokens // experts + (ids < tokens % experts).to(torch.int64)
    spread = float(value.max() - value.min()) or 1.0
    # An expert without room must not be bid for.
    price = torch.where(room > 0, 0.0, torch.inf).to(torch.float64)
    step = 0.25 * spread
    # A step too small to change a price would raise no bid, and the auction would never end.
    tolerance = max(tolerance, _FINEST_TOLERANCE)
    while True:
        owner, price = _auction(value, room, price, step)
        if step <= tolerance * spread:
            return owner
        step = max(step / 5, tolerance * spread)


def _auction(value: Tensor, room: Tensor, price: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Runs one auction to completion: the expert of each token, and the experts' prices."""
    tokens, experts = value.shape
    start = price
    bids = torch.full_like(value, -torch.inf)
    place = torch.arange(tokens, device=value.device).unsqueeze(1)
    free = torch.ones(tokens, dtype=torch.bool, device=value.device)
    while bool(free.any()):
        worth = value - price
        best = ops.top_k(worth, 2)
        top = torch.gather(worth, 1, best)
        # With a single expert left there is no second-best price to outbid.
        margin = torch.where(torch.isfinite(top[:, 1]), top[:, 0] - top[:, 1], 0.0)
        bid = price[best[:, 0]] + margin + step
        rows = place.squeeze(1)[free]
        bids[rows, best[free, 0]] = bid[free]
        order = torch.sort(bids, dim=0, descending=True, stable=True)
        rank = torch.empty_like(order.indices)
        rank.scatter_(0, order.indices, place.expand_as(order.indices))
        bids = bids.masked_fill(rank >= room, -torch.inf)
        lowest = order.values[(room - 1).clamp(min=0), torch.arange(experts, device=value.device)]
        price = torch.where((room > 0) & torch.isfinite(lowest), lowest, start)
        free = ~torch.isfinite(bids).any(dim=1)
    return torch.isfinite(bids).to(torch.int8).argmax(dim=1), price
