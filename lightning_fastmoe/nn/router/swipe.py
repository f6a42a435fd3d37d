"""FastMoE's SWIPE router: pairs that overflow a rank move to the next rank with room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class SwipeRouter(LinearRouter):
    """Top-k routing that gives every rank equally many pairs in training, and drops none.

    The experts form G groups of consecutive ids, one per expert rank. A group takes at most
    ``ceil(N / G)`` of the N (token, slot) pairs of the global batch. Slot by slot, the pairs
    arrive in order of (rank, token). A pair that finds its group full goes to the next group with
    room, in cyclic order (those that overflow from group 0 first), and there to the expert that
    its token scores highest. The weights are the softmax over the logits of the K experts that a
    token ends up with; two of them may be the same.

    In evaluation this is softmax top-k. Reads the counts of all ranks on the host.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        num_groups: G, a divisor of E; None for the number of ranks over which experts are sharded.
            Give a number to have the same routing on any topology.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``num_groups`` doesn't divide ``num_experts``.
    """

    uses_batch = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_groups: int | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        if num_groups is not None and (num_groups < 1 or num_experts % num_groups):
            raise ConfigError(
                f"num_groups={num_groups} does not divide num_experts={num_experts}: groups are"
                " equally large."
            )
        self.num_groups = num_groups

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        expert_ids = ops.top_k(logits.detach(), self.top_k)
        if context.training:
            expert_ids = self._swipe(logits.detach(), expert_ids, context)
        chosen = torch.gather(logits, 1, expert_ids)
        # The softmax over a single logit is always 1, which would give the router no gradient.
        scores = torch.softmax(logits, dim=-1)
        weights = (
            torch.softmax(chosen, dim=-1) if self.top_k > 1 else torch.gather(scores, 1, expert_ids)
        )
        return Routing(logits, scores, weights, expert_ids)

    def _swipe(self, logits: Tensor, expert_ids: Tensor, context: RoutingContext) -> Tensor:
        groups = self.num_groups or context.batch.num_expert_ranks
        each, slots = self.num_experts // groups, self.top_k
        group_ids = expert_ids // each
        one_hot = torch.arange(groups, device=logits.device)
        demand = (group_ids.unsqueeze(-1) == one_hot).sum(dim=0)  # (K, G)
        table = context.batch.gather_counts(demand.reshape(-1), context.layer)
        by_rank = table.view(-1, slots, groups).tolist()
        room = [-(-int(table.sum()) // groups)] * groups
        # The best expert of each token in each group, (T, G).
        best = logits.view(-1, groups, each).argmax(dim=-1) + one_hot * each
        columns = []
        for k in range(slots):
            stays, moves, room = swipe_plan([rank[k] for rank in by_rank], room)
            columns.append(
                _moved(
                    expert_ids[:, k],
                    group_ids[:, k],
                    best,
                    stays[context.batch.rank],
                    moves[context.batch.rank],
                )
            )
        return torch.stack(columns, dim=1)


def swipe_plan(
    demand: Sequence[Sequence[int]], room: Sequence[int]
) -> tuple[list[list[int]], list[list[list[int]]], list[int]]:
    """Which pairs stay in their group and which move, for one slot.

    Args:
        demand: [rank][group], pairs that arrive.
        room: [group], pairs that still fit; in total at least as many as arrive.

    Returns:
        ``stays`` [rank][group]; ``moves`` [rank][group], the new groups of those that don't stay,
        in order; and the room that is left.
    """
    left = list(room)
    stays = []
    for rank in demand:
        kept = [min(want, free) for want, free in zip(rank, left, strict=True)]
        left = [free - k for free, k in zip(left, kept, strict=True)]
        stays.append(kept)
    moves: list[list[list[int]]] = [[[] for _ in room] for _ in demand]
    for group in range(len(room)):  # outer loop, so that the order doesn't depend on the ranks
        at = group
        for rank, kept, targets in zip(demand, stays, moves, strict=True):
            for _ in range(rank[group] - kept[group]):
                while left[at] == 0:
                    at = (at + 1) % len(left)
                left[at] -= 1
                targets[group].append(at)
    return stays, moves, left


def _moved(
    expert_ids: Tensor, group_ids: Tensor, best: Tensor, stays: list[int], moves: list[list[int]]
) -> Tensor:
    """One slot's expert ids (T,) after this rank's moves."""
    result = expert_ids
    for group, targets in enumerate(moves):
        if targets:
            late = torch.nonzero(group_ids == group).squeeze(1)[stays[group] :]
            to = torch.tensor(targets, device=best.device)
            result = result.index_copy(0, late, best[late, to])
    return result
