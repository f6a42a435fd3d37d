"""What a rank sends where when each token goes once to each rank with some of its experts.

A *pair* is a (token, rank), number ``t * R + r``; pairs are sorted by rank, then by token. Nothing
here waits for the device. The functions are the kernels of csrc/exchange/plan.cu and their twins.

T tokens, K slots per token, E experts, R ranks; S pairs are sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import native
from lightning_fastmoe.ops.routing import order_by_expert

ID_BYTES = 4
"""Bytes of an expert's number as it travels with a token."""


@dataclass(frozen=True)
class PairPlan:
    """Which tokens go to which ranks.

    Attributes:
        of_experts: (E,) int64, the tokens of each expert.
        of_ranks: (R,) int64, the pairs of each rank.
        order: (T*R,) int64, pairs by rank; those that aren't sent come last.
        inverse: (T*R,) int64, the place of each pair in ``order``.
        offsets: (R + 1,) int32, where each rank's pairs end in ``order``; the last: all.
        owner: (T, K) int32, the rank of each slot's expert; R for dropped slots.
    """

    of_experts: Tensor
    of_ranks: Tensor
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    owner: Tensor

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.of_ranks)

    @property
    def ends(self) -> Tensor:
        """(R,) int32, where each rank's pairs end in ``order``."""
        return self.offsets[: self.ranks]


def plan_pairs(
    chosen: Tensor, where: Tensor, weights: Tensor, ranks: int
) -> tuple[PairPlan, Tensor]:
    """Plans what is sent.

    Args:
        chosen: (T, K) int64, experts; E for dropped slots.
        where: (2, E + 1) int64, each expert's rank and its number there; R and -1 for E.
        weights: (T, K).
        ranks: R.

    Returns:
        The plan; and ``packed (T*R, b)`` uint8, what travels with a pair that is sent: for each
        slot int32, its expert's number on that rank or -1 if it is another's, then the slots'
        weights. Apart from the plan, which the backward pass keeps.
    """
    library = native(chosen, weights)
    if library is not None and weights.dtype == torch.float32:
        order, inverse, offsets, owner, packed, of_experts, of_ranks = library.exchange_plan(
            chosen.contiguous(), where, weights.contiguous(), ranks
        )
    else:
        keys, packed, owner, of_experts = _pairs(chosen, where, weights, ranks)
        pairs = order_by_expert(keys, ranks + 1)
        order, inverse, offsets = pairs.order, pairs.inverse, pairs.offsets
        of_ranks = pairs.tokens_per_expert
    return PairPlan(of_experts, of_ranks[:ranks], order, inverse, offsets, owner), packed


def _pairs(
    chosen: Tensor, where: Tensor, weights: Tensor, ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, slots), num_experts = chosen.shape, where.shape[1] - 1
    owner, local = where[0][chosen], where[1][chosen]
    every = torch.arange(ranks, device=chosen.device)
    needed = (owner.unsqueeze(2) == every).any(1)
    here = owner.unsqueeze(1) == every.view(1, -1, 1)
    ids = torch.where(here, local.unsqueeze(1), -1).to(torch.int32)
    wide = weights.unsqueeze(1).expand(here.shape).contiguous()
    bytes_of = [part.view(tokens * ranks, slots).view(torch.uint8) for part in (ids, wide)]
    counts = order_by_expert(chosen, num_experts + 1).tokens_per_expert[:-1]
    keys = torch.where(needed, every, ranks).view(-1)
    return keys, torch.cat(bytes_of, dim=1), owner.to(torch.int32), counts
