"""A schedule that sends each token once to each rank that holds some of its experts.

:class:`~lightning_fastmoe.distributed.dispatch.AllToAllDispatcher` sends a row per chosen expert.
With K = 8 of 128 experts on 2 ranks, that is four times as much between ranks. The owner computes
with the fused layer, whose gather makes the rows per expert, sums a token's rows, and returns one.
The idea is that of DeepEP's dispatch (https://github.com/deepseek-ai/DeepEP).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch import AllToAllDispatcher, ExpertGroup, Route
from lightning_fastmoe.distributed.dispatch.pair_exchange import PairExchange, RoutedPairs
from lightning_fastmoe.distributed.dispatch.per_rank import RankDraft, return_sums, send_tokens
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import SequentialSchedule
from lightning_fastmoe.ops import kernels


class DedupSchedule(SequentialSchedule):
    """Sends a row per (token, rank) instead of one per (token, expert).

    For token choice and soft routing with stacked experts. Expert choice and experts that are
    modules, which need rows by expert, go by way of all_to_all.

    The owner sums a token's rows with their weights in fp32 and rounds once; the token's rank sums
    over ranks in fp32. In half precision that is one more rounding per (token, rank) than on one
    rank; sums have a fixed order, so each run gives the same bits.

    Args:
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank, ascending, every id once.
        parts: with 2, one half of the tokens is exchanged while the experts compute the other. The
            weights' gradients are then the sums of two.

    Raises:
        TopologyError: if the placement doesn't give each expert to exactly one rank.
    """

    def __init__(
        self,
        group: ExpertGroup,
        num_experts: int,
        placement: Sequence[Sequence[int]],
        parts: int = 1,
    ) -> None:
        super().__init__(AllToAllDispatcher(group, num_experts, placement))
        self.group, self.num_experts, self.parts = group, num_experts, parts
        self.held = [list(ids) for ids in placement]
        self.where = owners(placement, num_experts)
        # The rows for each rank are counted with the tokens of each expert.
        group.slots = max(group.slots, parts * (num_experts + group.size))

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`~lightning_fastmoe.nn.schedule.Schedule`.

        Raises:
            ExchangeError: on all ranks of the group, if they disagree.
        """
        if not self.takes(inputs, routing, experts):
            return super().run_routed(inputs, routing, experts, layer)
        chosen = self.reached(routing.expert_ids, routing.dispatched)
        wide = routing.weights.to(kernels.accumulation_dtype(inputs.tokens.dtype))
        y, counts = self.run_per_rank(inputs.tokens, chosen, wide, experts, layer)
        if routing.dispatched is None:  # else they are those of what wasn't dropped
            routing = routing._replace(tokens_per_expert=counts)
        return y, routing

    def reached(self, expert_ids: Tensor, dispatched: Tensor | None) -> Tensor:
        """``expert_ids (T, K)``, with E for slots that are not dispatched."""
        if dispatched is None:
            return expert_ids
        return expert_ids.masked_fill(~dispatched, self.num_experts)

    def takes(self, inputs: TokenInputs, routing: Routing, experts: Experts) -> bool:
        """Whether rows are sent per (token, rank)."""
        return experts.is_stacked and inputs.spec is None and routing.token_ids is None

    def run_per_rank(
        self, x: Tensor, chosen: Tensor, wide: Tensor, experts: Experts, layer: str
    ) -> tuple[Tensor, Tensor]:
        """Sends a row per (token, rank), computes, and returns the sums.

        Args:
            x: (T, D).
            chosen: (T, K) int64, the experts; E for dropped slots.
            wide: (T, K), their weights in the accumulation dtype.
            experts: those of this rank.
            layer: the layer's name.

        Returns:
            (T, D); and (E,) int64, this rank's tokens of each expert.
        """
        rank = self.group.rank
        sizes = _split(x.shape[0], self.parts)
        drafts = [self.draft(part) for part in chosen.split(sizes)]
        counts = torch.cat([one.counts for one in drafts])
        # (R, parts, E + R): the tokens of each expert, then the rows to each rank.
        table = self.group.exchange_counts(counts, x.shape[1], layer)
        table = table.view(self.group.size, self.parts, self.num_experts + self.group.size)
        arrivals, returns = [], []
        for one, x_part, w_part, of_part in zip(
            drafts, x.split(sizes), wide.split(sizes), table.unbind(1), strict=True
        ):
            of_ranks = of_part[:, self.num_experts :]
            send, receive = of_ranks[rank].tolist(), of_ranks[:, rank].tolist()
            plan = one.plan(sum(send))
            there = self._route(send, receive, layer, "dispatch")
            back = self._route(receive, send, layer, "combine")
            rows = int(of_part[:, self.held[rank]].sum())
            arrivals.append((send_tokens(x_part, w_part, plan, there), plan, back, rows))
        for arrive, plan, back, rows in arrivals:
            received, weights, ids = arrive()
            local = len(self.held[rank])
            keys = torch.where(ids < 0, local, ids).long()
            sums = run_experts(experts, received, weights, keys, local, rows)
            returns.append(return_sums(sums, plan, back))
        outputs = [arrive_sums() for arrive_sums in returns]
        of_experts = [one.counts[: self.num_experts] for one in drafts]
        if self.parts == 1:
            return outputs[0], of_experts[0]
        return torch.cat(outputs), torch.stack(of_experts).sum(0)

    def pair_exchange(
        self, x: Tensor, chosen: Tensor, returned: torch.dtype, layer: str
    ) -> PairExchange:
        """A pass in which experts return a row per (token, slot).

        Args:
            x: (T, D).
            chosen: (T, K) int64, the experts; E for dropped slots.
            returned: the widest dtype in which they may do so.
            layer: the layer's name.
        """
        draft = self.draft(chosen)
        table = self.group.exchange_counts(draft.counts, x.shape[1], layer)
        return RoutedPairs(self.group, draft, table, self.held, layer)

    def draft(self, chosen: Tensor) -> RankDraft:
        """What is known of ``chosen (T, K)``, E for dropped slots, before the host waits."""
        self.where = self.where.to(chosen.device)
        return draft(chosen, self.where, self.group.size)

    def _route(self, send: list[int], receive: list[int], layer: str, phase: str) -> Route:
        return Route(dist.all_to_all_single, self.group, send, receive, layer, phase)


def _split(tokens: int, parts: int) -> list[int]:
    """The sizes of almost equal parts."""
    return [(tokens + part) // parts for part in range(parts)]


def run_experts(
    experts: Experts, received: Tensor, weights: Tensor, keys: Tensor, num_local: int, rows: int
) -> Tensor:
    """The weighted sum of what this rank's experts make of each row that arrived.

    Args:
        experts: this rank's.
        received: (S', D).
        weights: (S', K).
        keys: (S', K) int64, the local expert that each slot chose, e if another rank's.
        num_local: e.
        rows: how many slots chose one.

    Returns:
        (S', D).
    """
    # Slots that chose experts of other ranks come last, and get no row.
    order = ops.order_of_held(keys, num_local, rows)
    sums: Tensor = experts(received, order.tokens_per_expert, weights, order)
    return sums


def owners(placement: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """(2, E + 1) int64: each expert's rank and its number there; R and -1 for dropped slots."""
    sizes = torch.tensor([len(ids) for ids in placement])
    rank = torch.repeat_interleave(torch.arange(len(placement)), sizes)
    local = torch.cat([torch.arange(len(ids)) for ids in placement])
    where = torch.empty(2, num_experts + 1, dtype=torch.int64)
    where[:, torch.tensor(list(chain(*placement)), dtype=torch.int64)] = torch.stack([rank, local])
    where[:, num_experts] = torch.tensor([len(placement), -1])
    return where


def needed(owner: Tensor, ranks: int) -> Tensor:
    """(T, R) bool: whether a token goes to a rank, from ``owner (T, K)``, R for dropped slots."""
    found = torch.zeros(len(owner), ranks + 1, dtype=torch.bool, device=owner.device)
    return found.scatter_(1, owner, True)[:, :ranks]


def draft(chosen: Tensor, where: Tensor, ranks: int) -> RankDraft:
    """What is known of ``chosen (T, K)``, E for dropped slots, before the host waits.

    Args:
        chosen: (T, K) int64.
        where: of :func:`owners`, on the same device.
        ranks: R.
    """
    num_experts = where.shape[1] - 1
    owner, local = where[0][chosen], where[1][chosen]  # (T, K)
    every = torch.arange(ranks, device=chosen.device)
    pairs = ops.order_by_expert(torch.where(needed(owner, ranks), every, ranks), ranks + 1)
    of_experts = ops.order_by_expert(chosen, num_experts + 1).tokens_per_expert
    counts = torch.cat([of_experts[:-1], pairs.tokens_per_expert[:-1]])
    return RankDraft(counts, owner, local, pairs, ranks)
