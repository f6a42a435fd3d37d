"""The layer on the CPU, one expert at a time. Only for layers without biases.

The steps and names are those of :mod:`~lightning_fastmoe.ops.steps`, but each expert's rows go
through all steps while they are in the CPU's cache; grouped GEMMs with passes over all rows between
them would be bound by memory bandwidth. Only two buffers have T*K rows: the pre-activation, if a
backward follows, and the expert outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.layer_call import Gradients, LayerCall, PreActivation, Wanted

_ALIGNMENT = 64


def applies(x: Tensor) -> bool:
    """Whether the loop applies to ``x``. Not while compiling: graphs can't depend on counts."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def forward(call: LayerCall, keep_h: bool) -> tuple[Tensor, PreActivation]:
    """The output, like ``x``, and H, without rows unless ``keep_h``."""
    x, inverse, weights = call.x, call.inverse, call.weights
    tokens, up, down = _tokens(call), _aligned(call.up), _aligned(call.down)
    rows = x.shape[0] if call.order is None else call.order.shape[0]
    h = x.new_empty(rows if keep_h else 0, up.shape[1])
    y = x.new_empty(rows, x.shape[1])
    for e, mine in _experts(call.tokens_per_expert):
        h_e = h[mine] if keep_h else x.new_empty(mine.stop - mine.start, up.shape[1])
        torch.mm(_gathered(x, tokens, mine), up[e].T, out=h_e)
        torch.mm(kernels.activation(h_e, call.activation), down[e].T, out=y[mine])
    if inverse is not None and weights is not None:
        y = _sum_slots(y, inverse, weights.shape[1], weights)
    return y, PreActivation(h, False)


def pre_activation(call: LayerCall) -> PreActivation:
    """Recomputes H of :func:`forward`, bit for bit."""
    x, tokens, up = call.x, _tokens(call), _aligned(call.up)
    h = x.new_empty(x.shape[0] if call.order is None else call.order.shape[0], up.shape[1])
    for e, mine in _experts(call.tokens_per_expert):
        torch.mm(_gathered(x, tokens, mine), up[e].T, out=h[mine])
    return PreActivation(h, False)


def backward_(call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted) -> Gradients:
    """The gradients, given the output's gradient ``grad (T, D)``. Overwrites H."""
    return _backward(call, grad, h, wanted, overwrite=True)


def backward(call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted) -> Gradients:
    """:func:`backward_` that leaves H intact: it copies the rows of one expert at a time."""
    return _backward(call, grad, h, wanted, overwrite=False)


def _backward(
    call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted, *, overwrite: bool
) -> Gradients:
    x, weights, inverse, grad = call.x, call.weights, call.inverse, grad.contiguous()
    tokens, up, down = _tokens(call), _aligned(call.up), _aligned(call.down)
    used = x.new_ones(h.rows.shape[0], dtype=kernels.accumulation_dtype(x.dtype))
    if weights is not None and call.order is not None:
        used = weights.reshape(-1).index_select(0, call.order)
    dots = torch.empty_like(used)
    d_rows = x.new_empty(h.rows.shape[0], x.shape[1]) if wanted.x else None
    some = range(up.shape[0]) if wanted.experts is None else wanted.experts
    place = {e: row for row, e in enumerate(some)}
    d_up, d_down = (
        weight.new_empty(len(place), *weight.shape[1:]) if needed else None
        for weight, needed in ((up, wanted.up), (down, wanted.down))
    )
    for e, mine in _experts(call.tokens_per_expert, place, d_up, d_down):
        d_out = _gathered(grad, tokens, mine)
        d_h = h.rows[mine] if overwrite else h.rows[mine].clone()
        act = torch.mm(d_out, down[e])
        # This overwrites the pre-activation with its gradient, `act` with the weighted activation.
        dots[mine] = kernels.activation_backward_(d_h, act, used[mine], None, call.activation)
        row = place.get(e)
        if d_down is not None and row is not None:
            torch.mm(d_out.T, act, out=d_down[row])
        if d_up is not None and row is not None:
            torch.mm(d_h.T, _gathered(x, tokens, mine), out=d_up[row])
        if d_rows is not None:
            torch.mm(d_h, up[e], out=d_rows[mine])
    d_x, d_weights = d_rows, None
    if weights is not None and inverse is not None:
        if d_rows is not None:
            d_x = _sum_slots(d_rows, inverse, weights.shape[1])
        if wanted.weights:
            d_weights = _picker(dots, inverse)(dots, inverse).view(weights.shape)
    return Gradients(d_x, d_weights, d_up, d_down)


def _experts(
    tokens_per_expert: Tensor, place: Mapping[int, int] | None = None, *grads: Tensor | None
) -> Iterator[tuple[int, slice]]:
    """Yields the experts with rows and their row ranges; zeroes the others' gradients.

    Args:
        tokens_per_expert: (E,) int64.
        place: expert -> its row in the gradients, of those that have one.
        grads: (rows, ...).
    """
    start = 0
    for e, count in enumerate(tokens_per_expert.tolist()):
        if count:
            yield e, slice(start, start + count)
        elif place is not None and (row := place.get(e)) is not None:
            for grad in grads:
                if grad is not None:
                    grad[row].zero_()
        start += count


def _tokens(call: LayerCall) -> Tensor | None:
    """(N,) int64, the token of each row; None where rows are tokens."""
    if call.weights is None or call.order is None:
        return None
    return torch.div(call.order, call.weights.shape[1], rounding_mode="floor")


def _aligned(weight: Tensor) -> Tensor:
    """The weight, aligned as torch itself allocates.

    The bits of a single-row GEMM depend on its operands' alignment, and ZeRO 3 gathers a parameter
    at varying addresses.
    """
    return weight if weight.data_ptr() % _ALIGNMENT == 0 else weight.clone()


def _gathered(x: Tensor, tokens: Tensor | None, mine: slice) -> Tensor:
    return x[mine] if tokens is None else x.index_select(0, tokens[mine])


def _picker(rows: Tensor, inverse: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of rows and places in them; it knows -1 if some pairs have no row."""
    if rows.shape[0] < inverse.shape[0]:
        return kernels.rows_or_zeros
    return lambda rows, places: rows.index_select(0, places)


def _sum_slots(rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """Computes :func:`~lightning_fastmoe.ops.kernels.sum_rows` slot by slot."""
    acc = kernels.accumulation_dtype(rows.dtype)
    if weights is not None and rows.shape[0] < inverse.shape[0]:
        weights = kernels.masked_weights(weights, inverse)
    picked, total = _picker(rows, inverse), None
    for k, slot in enumerate(inverse.view(-1, top_k).unbind(dim=1)):
        term = picked(rows, slot).to(acc)
        if weights is not None:
            term.mul_(weights[:, k : k + 1])
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.to(rows.dtype)
