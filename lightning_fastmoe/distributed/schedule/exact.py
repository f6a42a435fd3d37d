"""A schedule with the bits of one process that holds all experts, in every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch.pair_exchange import send_pairs, sum_pairs
from lightning_fastmoe.distributed.schedule.dedup import DedupSchedule
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.nn.experts.trained import trained_of
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import SequentialSchedule
from lightning_fastmoe.ops import kernels


class ExactSchedule(SequentialSchedule):
    """Sends a row per (token, rank), as ``way`` does, and gets one back per (token, slot).

    Outputs and gradients of tokens are bit-identical to those of
    :class:`~lightning_fastmoe.nn.LocalSchedule` with the tokens of all ranks: each product has the
    same rows, and the token's rank sums a token's rows over slots in fp32 and rounds once. So are
    gradients of the routing weights, except where a fused layer has biases, whose part is a product
    over all tokens of a rank. Gradients of experts are equal to rounding.

    Dropped slots are computed with weight zero, as there. Expert choice and experts that are
    modules go by way of all_to_all, which does what one process does with those.

    Args:
        way: how rows cross ranks.
    """

    def __init__(self, way: DedupSchedule) -> None:
        super().__init__(way.dispatcher)
        self.way = way

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`~lightning_fastmoe.nn.schedule.Schedule`.

        Raises:
            ConfigError: for experts of which single ones are trained, or that are computed in
                groups.
            ExchangeError: on all ranks of the group, if they disagree.
        """
        if not self.way.takes(inputs, routing, experts):
            return super().run_routed(inputs, routing, experts, layer)
        weights, dispatched = routing.weights, routing.dispatched
        if dispatched is not None:
            weights = weights.masked_fill(~dispatched, 0.0)
        wide = weights.to(kernels.accumulation_dtype(inputs.tokens.dtype))
        rest = (inputs.tokens, routing.expert_ids, wide, experts, layer)
        # A token's only row is multiplied by its weight where it was computed, before it is rounded
        # or after it, as one process does that.
        run = self.way.run_per_rank if wide.shape[1] == 1 else self._run_by_pair
        y, counts = run(*rest)
        if dispatched is None:
            routing = routing._replace(tokens_per_expert=counts)
        return y, routing

    def _run_by_pair(
        self, x: Tensor, chosen: Tensor, wide: Tensor, experts: Experts, layer: str
    ) -> tuple[Tensor, Tensor]:
        _check(experts, layer)
        exchange = self.way.pair_exchange(x, chosen, _returned(x, experts), layer)
        rows, weights, pairs = send_pairs(x, wide, exchange)
        order = ops.PairRows.of(pairs.order)
        y = experts(rows, order.tokens_per_expert, weights, order)
        return sum_pairs(y, wide, exchange, pairs, x.dtype), exchange.of_experts


def _returned(x: Tensor, experts: Experts) -> torch.dtype:
    """The widest dtype of what experts may make of :class:`~lightning_fastmoe.ops.PairRows`."""
    return kernels.accumulation_dtype(x.dtype) if experts.has_biases else x.dtype


def _check(experts: Experts, layer: str) -> None:
    """Raises:
    ConfigError: for experts whose rows can't be returned without their weights.
    """
    if trained_of(experts.holder) is not None:
        raise ConfigError(
            f"{layer}: exact=True can't train single experts. Drop SparseUpdate, or exact=True."
        )
    if groups_of(experts.holder) is not None:
        raise ConfigError(
            f"{layer}: exact=True can't compute experts in groups that don't fit on the device at"
            " once. Drop exact=True, or the offloading of experts."
        )
