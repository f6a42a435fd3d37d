"""The steps of a layer as plain functions: a CUDA kernel where one applies, else its torch twin.

None of them is differentiable; the autograd functions of :mod:`~lightning_fastmoe.ops.permute` and
the layer's :mod:`~lightning_fastmoe.ops.steps` call them. Twins compute half precisions in fp32, as
the kernels do, and fp64 in fp64. T tokens, D d_model, F d_ffn, E experts, K top_k, N = T*K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops.activation import GATED, PLAIN, apply_activation, is_gated
from lightning_fastmoe.ops.native import native


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, for results of autograd functions.

    ``x.to(dtype)`` that changes nothing gives ``x`` again, which dynamo of torch 2.11 takes for
    another tensor: where it traces the function, the result's gradient goes to the one that nobody
    uses, and the gradients of the function's arguments are zeros.
    """
    return x if x.dtype == dtype else x.to(dtype)


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Each token once per chosen expert, in expert-major order.

    Args:
        x: (T, D).
        order: (N,) int64, the flat (token, slot) pair of each output row.
        inverse: (T*K,) int64, the row of each pair, or -1.
        top_k: K.

    Returns:
        (N, D).
    """
    # The kernel writes a row for each pair.
    if order.shape == inverse.shape and (library := native(x, inverse)) is not None:
        return library.permute_rows(x.contiguous(), inverse, top_k)  # type: ignore[no-any-return]
    return x.index_select(0, _tokens_of(order, top_k))


def sum_rows(
    rows: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    top_k: int,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Each token's (weighted) sum of its rows, at most K, in slot order, accumulated in fp32.

    Args:
        rows: (N, D), with N <= T*K.
        inverse: (T*K,) int64, the row of each pair, or -1 for a pair without one. With N = T*K all
            have one.
        weights: (T, K), or None for a plain sum.
        top_k: K.
        bias: (E, D), added to each row of its expert before the weight; needs ``offsets``.
        offsets: (E,) int32, the row at which each expert ends.

    Returns:
        (T, D) in the dtype of ``rows``.
    """
    tensors = [t for t in (rows, inverse, weights, bias) if t is not None]
    if (library := native(*tensors)) is not None:
        w = None if weights is None else weights.to(torch.float32).contiguous()
        b = None if bias is None else bias.contiguous()
        return library.sum_rows(  # type: ignore[no-any-return]
            rows.contiguous(), inverse, w, top_k, b, offsets
        )
    acc = accumulation_dtype(rows.dtype)
    if bias is not None:
        rows = rows.to(acc) + bias_rows(bias, offsets, rows.shape[0]).to(acc)
    dtype = rows.dtype if bias is None else bias.dtype
    if rows.shape[0] < inverse.shape[0]:
        picked = rows_or_zeros(rows, inverse)
        # Zero times an infinite weight would not be zero.
        weights = None if weights is None else masked_weights(weights, inverse)
    else:
        picked = rows.index_select(0, inverse)
    if weights is None and top_k == 1:
        return rounded(picked, dtype)
    picked = picked.view(-1, top_k, rows.shape[1]).to(acc)
    if weights is not None:
        picked.mul_(weights.to(acc).unsqueeze(-1))  # in place, as it is a copy already
    total = picked[:, 0]
    for slot in range(1, top_k):  # from 16 on, Tensor.sum() has another order
        total = total + picked[:, slot]
    return rounded(total, dtype)


def sum_placed_rows(rows: Tensor, places: Tensor, ranks: int) -> Tensor:
    """Each token's sum of the rows at its places, in their order, accumulated in fp32.

    Unlike in :func:`sum_rows`, there may be rows that no token has.

    Args:
        rows: (N, D).
        places: (T*R,) int64, R per token; -1 for none.
        ranks: R.

    Returns:
        (T, D) in the dtype of ``rows``.
    """
    if (library := native(rows, places)) is not None:
        return library.sum_rows(rows, places, None, ranks, None, None)  # type: ignore[no-any-return]
    picked = rows_or_zeros(rows, places).view(-1, ranks, rows.shape[1])
    return picked.sum(dim=1, dtype=accumulation_dtype(rows.dtype)).to(rows.dtype)


def rows_or_zeros(rows: Tensor, places: Tensor) -> Tensor:
    """``rows[places]``, and zeros where a place is negative.

    Args:
        rows: (N, ...).
        places: (M,) int64.

    Returns:
        (M, ...).
    """
    if not rows.shape[0]:
        return rows.new_zeros(places.shape[0], *rows.shape[1:])
    missing = (places < 0).view(-1, *[1] * (rows.dim() - 1))
    return rows.index_select(0, places.clamp(min=0)).masked_fill_(missing, 0)


def masked_weights(weights: Tensor, inverse: Tensor) -> Tensor:
    """``weights (T, K)``, and zeros for the pairs without a row: those with -1 in ``inverse``."""
    return weights.masked_fill(inverse.view(weights.shape) < 0, 0)


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """(N,) int64: the expert of each expert-major row, from ``offsets (E,)``."""
    places = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True)


def bias_rows(bias: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """``bias (E, M)`` and ``offsets (E,)`` -> (N, M), each row's bias."""
    assert offsets is not None
    return bias.index_select(0, expert_of_rows(offsets, rows))


def unpermute_backward(
    grad: Tensor,
    y: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weighted :func:`sum_rows`.

    Args:
        grad: (T, D), the gradient of its result.
        y: (N, D), its rows.
        weights: (T, K).
        order: (N,) int64.
        inverse: (N,) int64.
        wanted: which of the two gradients are needed.

    Returns:
        ``d_y (N, D)`` and ``d_weights (T, K)``; unwanted ones may be None.
    """
    if any(wanted) and (library := native(grad, y, weights, inverse)) is not None:
        dy, dw = library.unpermute_backward(
            grad.contiguous(), y.contiguous(), weights.to(torch.float32).contiguous(), inverse
        )
        return dy, dw.to(weights.dtype)
    tokens, top_k = weights.shape
    acc = accumulation_dtype(y.dtype)
    dy = dw = None
    grad_acc = grad.to(acc)
    if wanted[0]:
        row_weights = weights.reshape(-1).index_select(0, order).to(acc)
        dy = grad_acc.index_select(0, _tokens_of(order, top_k)) * row_weights.unsqueeze(-1)
        dy = dy.to(y.dtype)
    if wanted[1]:
        picked = y.index_select(0, inverse).view(tokens, top_k, y.shape[1]).to(acc)
        dw = (picked * grad_acc.unsqueeze(1)).sum(dim=-1).to(weights.dtype)
    return dy, dw


def activation(
    h: Tensor, name: str, bias: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names, else ``(N, F) -> (N, F)``; rounded once.

    Args:
        h: rows in expert-major order.
        name: the activation.
        bias: (E, 2F) or (E, F), added to the rows of each expert first; needs ``offsets``.
        offsets: (E,) int32, the row at which each expert ends.
    """
    tensors = (h,) if bias is None else (h, bias)
    if (library := native(*tensors)) is not None:
        b = None if bias is None else bias.contiguous()
        return library.activation(h.contiguous(), b, offsets, name)  # type: ignore[no-any-return]
    return apply_activation(_biased(h, bias, offsets), name).to(h.dtype)


def add_bias_(h: Tensor, bias: Tensor, offsets: Tensor) -> None:
    """Adds to ``h (N, M)``, rows in expert-major order, the bias ``(E, M)`` of each row's expert.

    Args:
        h: the rows; overwritten.
        bias: of each expert.
        offsets: (E,) int32, the row at which each expert ends.
    """
    h += bias_rows(bias, offsets, h.shape[0]).to(h.dtype)


def activation_backward_(
    h: Tensor,
    d_act: Tensor,
    weights: Tensor,
    order: Tensor | None,
    name: str,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """The activation's whole backward in one pass. Overwrites ``h`` and ``d_act``.

    With ``A = act(h + bias)`` and row r's weight ``w = weights.flatten()[order[r]]`` (``[r]``
    without an order): ``h`` becomes ``w * d_act * act'(h + bias)``, ``d_act`` becomes ``w * A``,
    and the weight's gradient is ``<A[r], d_act[r]>``.

    Args:
        h: (N, 2F) for gated names, else (N, F); contiguous.
        d_act: (N, F), contiguous, the gradient that A would have if all weights were 1.
        weights: one per pair, of any shape; N without an order.
        order: (N,) int64, or None. Pairs without a row get the gradient zero.
        name: the activation.
        bias: (E, 2F) or (E, F), or None.
        offsets: (E,) int32, for the bias.

    Returns:
        ``d_weights`` like ``weights``.
    """
    tensors = (h, d_act, weights) if bias is None else (h, d_act, weights, bias)
    if order is not None and order.numel() < weights.numel():
        flat = weights.reshape(-1)
        dots = activation_backward_(h, d_act, flat[order], None, name, bias, offsets)
        return torch.zeros_like(flat).index_copy_(0, order, dots).view(weights.shape)
    if weights.dtype == torch.float32 and (library := native(*tensors)) is not None:
        b = None if bias is None else bias.contiguous()
        return library.activation_backward_(  # type: ignore[no-any-return]
            h, d_act, weights.contiguous(), order, b, offsets, name
        )
    acc = accumulation_dtype(h.dtype)
    flat = weights.reshape(-1)
    w = (flat if order is None else flat.index_select(0, order)).to(acc).unsqueeze(-1)
    grad, pre = d_act.to(acc), _biased(h, bias, offsets)
    gate, up = pre.chunk(2, dim=-1) if is_gated(name) else (pre, None)
    plain = PLAIN[GATED.get(name, name)]
    bent = plain.value(gate)
    value = bent if up is None else bent * up
    scaled = w * grad
    d_gate = plain.backward(scaled if up is None else scaled * up, gate)
    dots = (value * grad).sum(dim=-1).to(weights.dtype)
    # From here on nothing reads `h` and `d_act`, nor `gate`, `up` and `grad`, their views in fp32.
    d_act.copy_(value.mul_(w))
    if up is None:
        h.copy_(d_gate)
    else:
        into_gate, into_up = h.chunk(2, dim=-1)
        into_gate.copy_(d_gate)
        into_up.copy_(scaled.mul_(bent))
    if order is None:
        d_weights = dots
    else:
        d_weights = torch.empty_like(dots)
        d_weights[order] = dots  # each element once
    return d_weights.view(weights.shape)


def zero_empty_experts_(grad: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Zeroes the slices ``grad[e]`` of the experts without tokens.

    Args:
        grad: (E, ...), contiguous.
        tokens_per_expert: (E,) int64.

    Returns:
        ``grad``.
    """
    if (library := native(tokens_per_expert, grad)) is not None:
        library.zero_empty_experts_(grad, tokens_per_expert)
        return grad
    empty = (tokens_per_expert == 0).view(-1, *[1] * (grad.dim() - 1))
    return grad.masked_fill_(empty, 0)


def _biased(h: Tensor, bias: Tensor | None, offsets: Tensor | None) -> Tensor:
    """``h`` plus each row's bias, in the accumulation dtype."""
    wide = h.to(accumulation_dtype(h.dtype))
    return wide if bias is None else wide + bias_rows(bias, offsets, h.shape[0]).to(wide.dtype)


def _tokens_of(order: Tensor, top_k: int) -> Tensor:
    return order if top_k == 1 else torch.div(order, top_k, rounding_mode="floor")
