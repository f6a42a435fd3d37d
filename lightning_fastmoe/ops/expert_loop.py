"""The layer on the CPU, one expert after the other.

The same steps as in :mod:`~lightning_fastmoe.ops.expert_layer`. Each expert's rows go through all of them
while they lie in the cache. Memory holds two things of all T*K rows: the pre-activation, if a
backward follows, and what goes back to the tokens. Grouped products with a pass over all rows
between them wait for memory instead. Only for layers without biases.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels

_ALIGNMENT = 64


def applies(x: Tensor, *biases: Tensor | None) -> bool:
    """Whether to take this path. Graphs that a compiler records can't depend on counts."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and bool(x.shape[0]) and all(bias is None for bias in biases)


def forward(
    x: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    tokens_per_expert: Tensor,
    name: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """The layer's output, and the pre-activation H of all rows.

    Args:
        x: (T, D) in the order of the tokens; (N, D) by expert without ``order``.
        weights: (T, K), or None without ``order``.
        up: (E, 2F, D) or (E, F, D).
        down: (E, D, F).
        order: (N,) int64, or None.
        inverse: (N,) int64, or None.
        tokens_per_expert: (E,) int64.
        name: the activation.
        keep_h: whether a backward follows.

    Returns:
        Like ``x``, and (N, 2F) or (N, F), without rows unless ``keep_h``.
    """
    tokens, up, down = _tokens(weights, order), _aligned(up), _aligned(down)
    rows = x.shape[0] if order is None else order.shape[0]
    h = x.new_empty(rows if keep_h else 0, up.shape[1])
    y = x.new_empty(rows, x.shape[1])
    for e, mine in _experts(tokens_per_expert):
        h_e = h[mine] if keep_h else x.new_empty(mine.stop - mine.start, up.shape[1])
        torch.mm(_gathered(x, tokens, mine), up[e].T, out=h_e)
        torch.mm(kernels.activation(h_e, name), down[e].T, out=y[mine])
    if inverse is None or weights is None:
        return y, h
    return _sum_slots(y, inverse, weights.shape[1], weights), h


def pre_activation(
    x: Tensor, weights: Tensor | None, up: Tensor, order: Tensor | None, tokens_per_expert: Tensor
) -> Tensor:
    """H of all rows, as :func:`forward` keeps it."""
    tokens, up = _tokens(weights, order), _aligned(up)
    h = x.new_empty(x.shape[0] if order is None else order.shape[0], up.shape[1])
    for e, mine in _experts(tokens_per_expert):
        torch.mm(_gathered(x, tokens, mine), up[e].T, out=h[mine])
    return h


def backward_(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    tokens_per_expert: Tensor,
    name: str,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weights, up and down; those not in ``wants`` are None. Overwrites ``h``.

    Args:
        grad: like the output of :func:`forward`, whose other arguments and H the rest are.
        x: (T, D) or (N, D).
        h: (N, 2F) or (N, F).
        weights: (T, K) or None.
        up: (E, 2F, D) or (E, F, D).
        down: (E, D, F).
        order: (N,) int64 or None.
        inverse: (N,) int64 or None.
        tokens_per_expert: (E,) int64.
        name: the activation.
        wants: of the four gradients.
    """
    tokens, up, down = _tokens(weights, order), _aligned(up), _aligned(down)
    used = x.new_ones(h.shape[0], dtype=kernels.accumulation_dtype(x.dtype))
    if weights is not None and order is not None:
        used = weights.reshape(-1).index_select(0, order)
    dots = torch.empty_like(used)
    d_rows = x.new_empty(h.shape[0], x.shape[1]) if wants[0] else None
    d_up, d_down = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted else None
        for weight, wanted in ((up, wants[2]), (down, wants[3]))
    )
    for e, mine in _experts(tokens_per_expert, d_up, d_down):
        d_out, d_h = _gathered(grad, tokens, mine), h[mine]
        act = torch.mm(d_out, down[e])
        # From here on the pre-activation is its gradient, and `act` the weighted activation.
        dots[mine] = kernels.activation_backward_(d_h, act, used[mine], None, name)
        if d_down is not None:
            torch.mm(d_out.T, act, out=d_down[e])
        if d_up is not None:
            torch.mm(d_h.T, _gathered(x, tokens, mine), out=d_up[e])
        if d_rows is not None:
            torch.mm(d_h, up[e], out=d_rows[mine])
    d_x, d_weights = d_rows, None
    if weights is not None and inverse is not None:
        if d_rows is not None:
            d_x = _sum_slots(d_rows, inverse, weights.shape[1])
        if wants[1]:
            d_weights = dots.index_select(0, inverse).view(weights.shape)
    return d_x, d_weights, d_up, d_down


def _experts(tokens_per_expert: Tensor, *grads: Tensor | None) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and where; those without get gradients of zero."""
    start = 0
    for e, count in enumerate(tokens_per_expert.tolist()):
        if count:
            yield e, slice(start, start + count)
        else:
            for grad in grads:
                if grad is not None:
                    grad[e].zero_()
        start += count


def _tokens(weights: Tensor | None, order: Tensor | None) -> Tensor | None:
    """(N,) int64, the token of each row; None where rows are tokens."""
    if weights is None or order is None:
        return None
    return torch.div(order, weights.shape[1], rounding_mode="floor")


def _aligned(weight: Tensor) -> Tensor:
    """Weights at an address at which torch itself allocates.

    The bits of a product of one row depend on how its operands are aligned, and ZeRO 3 gathers a
    parameter now here, now there.
    """
    return weight if weight.data_ptr() % _ALIGNMENT == 0 else weight.clone()


def _gathered(x: Tensor, tokens: Tensor | None, mine: slice) -> Tensor:
    return x[mine] if tokens is None else x.index_select(0, tokens[mine])


def _sum_slots(rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """What :func:`~lightning_fastmoe.ops.kernels.sum_rows` computes, one slot after the other."""
    acc = kernels.accumulation_dtype(rows.dtype)
    total = None
    for k, slot in enumerate(inverse.view(-1, top_k).unbind(dim=1)):
        term = rows.index_select(0, slot).to(acc)
        if weights is not None:
            term.mul_(weights[:, k : k + 1])
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.to(rows.dtype)
