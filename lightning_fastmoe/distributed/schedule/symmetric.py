"""The schedule that pushes rows into other ranks' memory, instead of by way of NCCL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup
from lightning_fastmoe.distributed.dispatch.pair_exchange import PairExchange
from lightning_fastmoe.distributed.schedule.dedup import DedupSchedule, run_experts
from lightning_fastmoe.distributed.symmetric import SymmetricExchange
from lightning_fastmoe.distributed.symmetric.exchange import MAX_SLOTS
from lightning_fastmoe.distributed.symmetric.layer import (
    Expectation,
    run_layer,
    run_layer_by_hand,
)
from lightning_fastmoe.distributed.symmetric.operators import passage_for
from lightning_fastmoe.distributed.symmetric.pairs import PairPassage
from lightning_fastmoe.distributed.symmetric.tokens import Passage, return_sums, send_tokens
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.schedule import Back
from lightning_fastmoe.ops import kernels


class SymmetricSchedule(DedupSchedule):
    """Sends what :class:`DedupSchedule` sends, through memory that all ranks of a host map.

    A row's place at its destination follows from this rank's own counts, so rows leave before any
    count has been exchanged; counts arrive while they travel.

    Args:
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank, ascending, every id once.

    Raises:
        TopologyError: on all ranks, if one can't reach the memory of the others; or if the
            placement doesn't give each expert to exactly one rank.
    """

    def __init__(
        self, group: ExpertGroup, num_experts: int, placement: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(group, num_experts, placement)
        slots = _slots(group, num_experts)
        if not self.has_room(group, num_experts):
            raise TopologyError(
                f"dispatcher='symmetric' exchanges at most {MAX_SLOTS} counts, not {slots}: use"
                " dispatcher='dedup'."
            )
        self.exchange = SymmetricExchange.of(group)
        # On the CPU the host computes, so nothing stands still while it waits.
        self.expectation = Expectation() if self.exchange.device.type == "cuda" else None
        group.slots = max(group.slots, slots)

    @staticmethod
    def has_room(group: ExpertGroup, num_experts: int) -> bool:
        """Whether there is room for the counts of a layer with so many experts."""
        return _slots(group, num_experts) <= MAX_SLOTS

    def run_per_rank(
        self, x: Tensor, chosen: Tensor, wide: Tensor, experts: Experts, layer: str
    ) -> tuple[Tensor, Tensor]:
        """See :class:`DedupSchedule`."""
        if not self._reaches(x):
            return super().run_per_rank(x, chosen, wide, experts, layer)
        held, given = self.held[self.group.rank], self._given(chosen, layer)
        fused = experts.fused_stacks(x.dtype)
        if fused is not None:
            passage = passage_for(x, wide, fused[0], *given)
            y = run_layer(x, wide, *fused, passage, held, self.expectation)
            return y, passage.plan.of_experts
        passage = Passage(*given)
        received, weights, keys = send_tokens(x, wide, passage)
        rows = passage.sizes(held).pairs
        sums = run_experts(experts, received, weights, keys, len(held), rows)
        return return_sums(sums, passage), passage.plan.of_experts

    def run_by_hand(
        self,
        tensors: Sequence[Tensor | None],
        expert_ids: Tensor,
        dispatched: Tensor | None,
        activation: str,
        layer: str,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Back | None] | None:
        """See :class:`~lightning_fastmoe.nn.schedule.Schedule`."""
        x, weights, up, down, up_bias, down_bias = tensors
        assert x is not None
        assert weights is not None
        assert up is not None
        assert down is not None
        if not self._reaches(x):
            return None
        wide = weights.to(kernels.accumulation_dtype(x.dtype))
        stacks = up, down, up_bias, down_bias
        chosen, held = self.reached(expert_ids, dispatched), self.held[self.group.rank]
        passage = passage_for(x, wide, stacks, *self._given(chosen, layer))
        y, record = run_layer_by_hand(
            (x, wide, *stacks), activation, passage, held, self.expectation, wanted
        )
        return y, passage.plan.of_experts, None if record is None else record.back

    def _given(
        self, chosen: Tensor, layer: str
    ) -> tuple[SymmetricExchange, Tensor, Tensor, int, str]:
        """The arguments of a passage."""
        self.where = self.where.to(chosen.device)
        held = self.held[self.group.rank]
        return self.exchange, chosen, self.where, len(held), layer

    def pair_exchange(
        self, x: Tensor, chosen: Tensor, returned: torch.dtype, layer: str
    ) -> PairExchange:
        """See :class:`DedupSchedule`."""
        if not self._reaches(x):
            return super().pair_exchange(x, chosen, returned, layer)
        self.where = self.where.to(chosen.device)
        return PairPassage(self.exchange, chosen, self.where, self.held, returned, layer)

    def _reaches(self, x: Tensor) -> bool:
        """Not where a group of gloo has tokens on a GPU."""
        return x.device.type == self.exchange.device.type


def _slots(group: ExpertGroup, num_experts: int) -> int:
    """The numbers that a rank sends: the last is the memory that it needs."""
    return num_experts + group.size + 1
