"""A layer's passes through symmetric memory as four operators: Python stays off the critical path.

A layer's step launches about fifty short kernels, and the host can't run ahead of the device, since
each forward pass waits for the counts: the device then sits idle until the next layer's experts
have been launched. csrc/exchange/sharded_layer.cpp runs the passes of :class:`Passage` in four
calls, for experts that :class:`TwoOperators` computes on Hopper GPUs. In the backward pass the copy
engines move the tokens' gradients, so that the GEMM that overlaps with them has every
multiprocessor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.distributed.dispatch.counts import header
from lightning_fastmoe.distributed.symmetric.places import CountsPlace, RowsPlace, Sizes
from lightning_fastmoe.distributed.symmetric.tokens import BACKWARD, COMBINE, DISPATCH, Passage
from lightning_fastmoe.ops import Stacks, choice
from lightning_fastmoe.ops.exchange_counts import HEADER
from lightning_fastmoe.ops.exchange_plan import PairPlan
from lightning_fastmoe.ops.layer_call import Gradients, LayerCall, PreActivation, Wanted
from lightning_fastmoe.ops.native import MAX_EXPERTS
from lightning_fastmoe.ops.products.hopper import hopper
from lightning_fastmoe.ops.two_operators import TwoOperators


class OperatorPassage(Passage):
    """A :class:`Passage` in four operator calls, with bit-identical results.

    Args:
        library: the compiled kernels.
        given: the arguments of :class:`Passage`.
    """

    def __init__(self, library: Any, *given: Any) -> None:
        super().__init__(*given)
        self._library = library

    def _launch(
        self,
        rows: Tensor,
        weights: Tensor,
        width: int,
        counts: CountsPlace,
        needed: int,
        *,
        fits: bool,
    ) -> tuple[PairPlan, Tensor]:
        exchange, place, table = self._exchange, self._place, self._exchange.table
        control, flags = exchange.control.ranks, exchange.flags
        order, inverse, offsets, owner, packed, of_experts, of_ranks = (
            self._library.exchange_layer_start(
                *(rows, self._chosen.contiguous(), self._where, weights.contiguous(), control),
                control if exchange.rows is None else exchange.rows.ranks,
                exchange.group.rank,
                [
                    *(needed, exchange.slots, counts.own, counts.flags, counts.value),
                    *table.place,
                ],
                header(self._layer, counts.number, width),
                [*place.own, place.most if fits else 0, place.flags, place.value],
                *(flags.on_host(table.columns), flags.report, flags.reading_seconds),
                exchange.stream,
            )
        )
        exchange.start_reading(self._layer, is_launched=True)
        plan = PairPlan(of_experts, of_ranks[: self._ranks], order, inverse, offsets, owner)
        return plan, packed

    def experts_ahead(
        self, sizes: Sizes, up: Tensor, down: Tensor, activation: str, keep_h: bool
    ) -> tuple[LayerCall, Tensor, PreActivation]:
        """:meth:`receive_ahead`, the order of what came, and the experts.

        Args:
            sizes: what to expect at most.
            up: of this rank's experts.
            down: of this rank's experts.
            activation: its name.
            keep_h: whether a backward pass may follow.

        Returns:
            The call, its output and H, with as many rows as may come.
        """
        exchange, place = self._exchange, self._place
        counts, flags = exchange.counts_place, exchange.flags
        assert exchange.rows is not None
        slots = self._chosen.shape[1]
        exchange.awaited(self._layer, DISPATCH, place)
        begins, blocks = place.begins, place.blocks
        x, weights, ends, order, inverse, of_experts, offsets, sums, h = (
            self._library.exchange_layer_forward(
                *(exchange.control.ranks, exchange.rows.own, self._where, up, down),
                *(exchange.group.rank, slots, sizes.rows, sizes.pairs),
                [
                    *(begins[0], blocks[0], begins[1], blocks[1], place.flags, place.value),
                    *(exchange.capacity, place.most),
                ],
                [*exchange.table.place, 8 * HEADER, counts.flags, counts.value],
                *(flags.report, flags.seconds, exchange.stream, activation, keep_h),
            )
        )
        self._ends = ends
        call = LayerCall(
            *(x, weights, up, down, None, None, order, inverse, of_experts, offsets, activation)
        )
        return call, sums, PreActivation(h, False)

    def combine(self, sums: Tensor) -> Tensor:
        """See :meth:`Passage.combine`."""
        exchange = self._exchange
        assert exchange.rows is not None
        place = self._begin([sums.shape[1] * sums.element_size()], COMBINE)
        exchange.awaited(self._layer, COMBINE, place)
        found: Tensor = self._library.exchange_layer_combine(
            *(sums, self._ends, self.plan.inverse, self.plan.offsets, exchange.control.ranks),
            *(exchange.rows.ranks, exchange.group.rank),
            [place.own[0], place.begins[0], place.most, place.flags, place.value],
            *(exchange.flags.report, exchange.flags.seconds),
        )
        return found

    def takes(self, call: LayerCall, h: PreActivation) -> bool:
        """Whether :meth:`backward_` computes the gradients of a call."""
        chosen = choice.choose(call, h)
        return isinstance(chosen, TwoOperators) and chosen.on_hopper

    def backward_(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """The whole backward pass, given the gradient of the tokens' sums. Overwrites H.

        Args:
            call: of this rank's experts, with the rows that came.
            grad: (T, D).
            h: the call's pre-activation.
            wanted: tokens and weights at least.

        Returns:
            Of this rank's tokens and weights, and of its experts.
        """
        exchange, plan, layer = self._exchange, self.plan, self._layer
        assert exchange.rows is not None
        assert call.weights is not None
        row_bytes = grad.shape[1] * grad.element_size()
        phases = COMBINE + BACKWARD, DISPATCH + BACKWARD
        there = self._begin([row_bytes], phases[0])
        exchange.awaited(layer, phases[0], there)
        back = self._begin([row_bytes, 4 * call.weights.shape[1]], phases[1])
        exchange.awaited(layer, phases[1], back)
        d_x, d_weights, d_up, d_down = self._library.exchange_layer_backward_(
            *(grad.contiguous(), plan.order, plan.inverse, plan.offsets, plan.owner),
            *(exchange.control.ranks, exchange.rows.ranks, exchange.group.rank),
            _places(there),
            [*back.own, *back.begins, back.blocks[1], back.most, back.flags, back.value],
            *(self._received, exchange.flags.report, exchange.flags.seconds, exchange.stream),
            *(call.x, h.rows, call.weights, call.up, call.down, call.order, call.inverse),
            *(call.offsets, call.activation, wanted.up, wanted.down),
        )
        return Gradients(
            d_x, d_weights, d_up if wanted.up else None, d_down if wanted.down else None
        )


def passage_for(x: Tensor, weights: Tensor, stacks: Stacks, *given: Any) -> Passage:
    """The passage of a layer's call that launches it fastest.

    Args:
        x: (T, D).
        weights: (T, K).
        stacks: of this rank's experts.
        given: the arguments of :class:`Passage`.
    """
    up, down, *biases = stacks
    is_plain = weights.dtype == torch.float32 and all(bias is None for bias in biases)
    if is_plain and len(up) < MAX_EXPERTS:  # their order has one more, for other ranks'
        with torch.no_grad():  # the operators record no graph: the layer's node does
            library = hopper(x, up, down)
        if library is not None:
            return OperatorPassage(library, *given)
    return Passage(*given)


def _places(place: RowsPlace) -> list[int]:
    """Of an exchange of one part."""
    one = place.own[0], place.begins[0], place.blocks[0]
    return [*one, place.most, place.flags, place.value]
