"""A layer whose tokens travel through symmetric memory, forward and backward as one autograd node.

Two things can't be done by nodes that know nothing of each other. In the forward pass, the experts
are launched before the host has seen any count, with memory for a few rows more than came in the
passes before: otherwise the device stands still from the arrival of the rows until the host, which
waits for the counts, has launched what follows. In the backward pass, the tokens' gradients travel
while those of weights are computed (:mod:`~lightning_fastmoe.distributed.symmetric.operators`).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.symmetric.operators import OperatorPassage
from lightning_fastmoe.distributed.symmetric.places import Sizes
from lightning_fastmoe.distributed.symmetric.tokens import Passage
from lightning_fastmoe.errors import ExchangeError
from lightning_fastmoe.ops import choice
from lightning_fastmoe.ops.exchange_arrival import Received
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation, Wanted, restore

_SLACK = 16
_REMEMBERED = 8
_AGAIN = (
    "dispatcher='symmetric' computes experts again with the rows that came, because it could not"
    " with as many as may come"
)


class Expectation:
    """What comes to a rank in a pass of a layer, judged by the latest ones.

    Whether it holds changes no bit: a pass that it doesn't hold for is computed again. Passes with
    a graph are judged apart from those without: what they take is kept until the backward pass,
    and validation may have batches of which training has no memory for the graphs.
    """

    def __init__(self) -> None:
        self._latest: dict[bool, deque[Sizes]] = {
            with_graph: deque(maxlen=_REMEMBERED) for with_graph in (False, True)
        }

    def add(self, sizes: Sizes, *, with_graph: bool) -> None:
        """Remembers what came."""
        self._latest[with_graph].append(sizes)

    def at_most(self, slots: int, *, with_graph: bool, all_pairs: bool = False) -> Sizes | None:
        """A sixteenth more than the most of the latest passes; None before the first.

        Args:
            slots: K. There will be a slot without an expert of this rank.
            with_graph: whether the pass keeps something for a backward pass.
            all_pairs: instead, with K = 1, there will be none: see
                :func:`~lightning_fastmoe.ops.choice.moves_rows`.
        """
        latest = self._latest[with_graph]
        if not latest:
            return None
        rows = max(sizes.rows for sizes in latest)
        pairs = max(sizes.pairs for sizes in latest)
        rows += rows // _SLACK + 1
        if all_pairs:
            return Sizes(rows, rows)
        return Sizes(rows, min(pairs + pairs // _SLACK + 1, rows * slots - 1))


class _Layer(torch.autograd.Function):
    """The arguments are those of :func:`run_layer`, then whether to keep H."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        passage: Passage,
        held: list[int],
        expectation: Expectation | None,
        activation: str,
        keep_h: bool,
    ) -> Tensor:
        def compute(came: Received, pairs: int) -> tuple[LayerCall, Tensor, PreActivation]:
            order = ops.order_of_held(came.keys, passage.num_local, pairs)
            call = LayerCall(
                *(came.rows.view(x.dtype), came.weights, up, down, up_bias, down_bias),
                *(order.order, order.inverse, order.tokens_per_expert, order.offsets, activation),
            )
            return call, *choice.choose(call).forward(call, keep_h)

        expected = None
        if passage.start(x, weights) and expectation is not None:
            slots = weights.shape[1]
            stacks = [s for s in (up, down, up_bias, down_bias) if s is not None]
            if choice.takes_more_rows(x, *stacks):
                all_pairs = choice.moves_rows(slots, x, *stacks)
                expected = expectation.at_most(slots, with_graph=keep_h, all_pairs=all_pairs)
        found = None
        if expected is not None:
            try:
                if isinstance(passage, OperatorPassage):
                    found = passage.experts_ahead(expected, up, down, activation, keep_h)
                else:
                    found = compute(passage.receive_ahead(expected), expected.pairs)
            except ExchangeError:
                raise
            except RuntimeError as error:  # operators in C++ say no more of a lack of memory
                # There may be memory for those that came, and the other ranks wait for this one.
                warnings.warn(f"{_AGAIN}: {error}", stacklevel=2)
        is_short = passage.settle()
        sizes = passage.sizes(held)
        if expectation is not None:
            expectation.add(sizes, with_graph=keep_h)
        if expected is None or is_short or not sizes.fit_into(expected):
            found = None  # frees its memory
        if found is None:
            found = compute(passage.receive(), sizes.pairs)
        call, sums, h = found
        _save(ctx, call, h, sizes, keep_h=keep_h)
        ctx.passage = passage
        return passage.combine(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passage, needs = ctx.passage, ctx.needs_input_grad
        call, h = restore(ctx)
        if h is None:
            h = choice.choose(call).pre_activation(call)
        ctx.h_is_spent = True
        sends = needs[0] or needs[1]  # both or none
        wanted = Wanted(sends, sends, *needs[2:6])
        if sends and isinstance(passage, OperatorPassage) and passage.takes(call, h):
            return *passage.backward_(call, grads[0], h, wanted), *(None,) * 5
        d_sums = passage.combine_backward(grads[0])
        found = choice.choose(call, h).backward_(call, d_sums, h, wanted)
        d_x = d_weights = None
        if wanted.x:
            assert found.x is not None
            assert found.weights is not None
            passage.send_gradients(found.x, found.weights)
            d_x, d_weights = passage.receive_gradients()
        return d_x, d_weights, *found[2:], *(None,) * 5


def _save(ctx: Any, call: LayerCall, h: PreActivation, sizes: Sizes, *, keep_h: bool) -> None:
    """Saves what belongs to rows that came, for :func:`restore`, without those that might have."""
    assert call.weights is not None
    assert call.order is not None
    assert call.inverse is not None
    rows, pairs, slots = sizes.rows, sizes.pairs, call.weights.shape[1]
    ctx.save_for_backward(
        h.rows[:pairs] if keep_h else h.rows,
        *(call.x[:rows], call.weights[:rows], call.up, call.down, call.up_bias, call.down_bias),
        *(call.order[:pairs], call.inverse[: rows * slots]),
        *(call.tokens_per_expert, call.offsets),
    )
    ctx.activation, ctx.h_has_bias, ctx.h_is_spent = call.activation, h.has_bias, False


class Recorded:
    """What a pass keeps for its backward pass where autograd doesn't record it.

    It looks like a node's context.

    Args:
        wanted: whether the gradients of x, weights, up, down and the biases are needed.
    """

    passage: Passage
    activation: str
    h_has_bias: bool
    h_is_spent: bool

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.needs_input_grad = (*wanted, *(False,) * 5)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps tensors."""
        self.saved_tensors = tensors

    def back(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients that are needed."""
        found: tuple[Tensor | None, ...] = _Layer.backward(self, grad)
        pairs = zip(found, self.needs_input_grad, strict=True)
        return [gradient for gradient, needed in pairs if needed]


def run_layer_by_hand(
    tensors: Sequence[Tensor | None],
    activation: str,
    passage: Passage,
    held: list[int],
    expectation: Expectation | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Recorded | None]:
    """:func:`run_layer` without autograd.

    Args:
        tensors: x, weights and the stacks, as there.
        activation: see there.
        passage: see there.
        held: see there.
        expectation: see there.
        wanted: which of the tensors' gradients are needed.

    Returns:
        (T, D), and what goes back; None if no gradient is needed.
    """
    record, keeps = Recorded(wanted), any(wanted)
    rest: tuple[Any, ...] = passage, held, expectation, activation, keeps
    y: Tensor = _Layer.forward(record, *(*tensors, *rest))
    return y, record if keeps else None


def run_layer(
    x: Tensor,
    weights: Tensor,
    stacks: ops.Stacks,
    activation: str,
    passage: Passage,
    held: list[int],
    expectation: Expectation | None,
) -> Tensor:
    """Sends tokens to the ranks of their experts, computes, and sends the sums back.

    Args:
        x: (T, D).
        weights: (T, K), in the accumulation dtype.
        stacks: of this rank's experts, in the dtype of ``x``.
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        passage: of this call alone.
        held: global ids of this rank's experts.
        expectation: of the layer; None waits for the counts.

    Returns:
        (T, D), each token's weighted sum.
    """
    needs_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weights, *stacks)
    )
    return _Layer.apply(  # type: ignore[no-any-return]
        x, weights, *stacks, passage, held, expectation, activation, needs_graph
    )
