"""The steps of a layer as plain functions: the CUDA kernel where it serves, else its torch twin.

None of them knows autograd; the autograd functions of :mod:`~lightning_fastmoe.ops.permute` and
:mod:`~lightning_fastmoe.ops.layer` are made of them. Twins compute half precisions in fp32, as the
kernels do, and fp64 in fp64. T tokens, D d_model, F d_ffn, E experts, K top_k, N = T*K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops.activation import GATED, apply_activation, is_gated
from lightning_fastmoe.ops.native import native


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Each token once per chosen expert, in expert-major order.

    Args:
        x: (T, D).
        order: (N,) int64, the flat (token, slot) pair of each output row.
        inverse: (N,) int64, the row of each pair.
        top_k: K.

    Returns:
        (N, D).
    """
    if (library := native(x, inverse)) is not None:
        return library.permute_rows(x.contiguous(), inverse, top_k)  # type: ignore[no-any-return]
    return x.index_select(0, _tokens_of(order, top_k))


def sum_rows(rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """Each token's (weighted) sum of its K rows, in slot order, accumulated in fp32.

    Args:
        rows: (N, D).
        inverse: (N,) int64.
        weights: (T, K), or None for a plain sum.
        top_k: K.

    Returns:
        (T, D) in the dtype of ``rows``.
    """
    tensors = (rows, inverse) if weights is None else (rows, inverse, weights)
    if (library := native(*tensors)) is not None:
        w = None if weights is None else weights.to(torch.float32).contiguous()
        return library.sum_rows(rows.contiguous(), inverse, w, top_k)  # type: ignore[no-any-return]
    picked = rows.index_select(0, inverse)
    if weights is None and top_k == 1:
        return picked
    acc = accumulation_dtype(rows.dtype)
    picked = picked.view(-1, top_k, rows.shape[1])
    if weights is None:
        return picked.sum(dim=1, dtype=acc).to(rows.dtype)
    return (picked.to(acc) * weights.to(acc).unsqueeze(-1)).sum(dim=1).to(rows.dtype)


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
        ``d_y (N, D)`` and ``d_weights (T, K)``; those that aren't wanted may be None.
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


def activation(h: Tensor, name: str) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names, else ``(N, F) -> (N, F)``; rounded once."""
    if (library := native(h)) is not None:
        return library.activation(h.contiguous(), name)  # type: ignore[no-any-return]
    return apply_activation(h.to(accumulation_dtype(h.dtype)), name).to(h.dtype)


def activation_backward_(
    h: Tensor, d_act: Tensor, weights: Tensor, order: Tensor | None, name: str
) -> tuple[Tensor, Tensor]:
    """All that the backward needs of the activation, in one pass. Overwrites ``d_act``.

    With ``A = act(h)`` and row r's weight ``w = weights.flatten()[order[r]]`` (``[r]`` without an
    order): ``d_h = w * d_act * act'(h)``, the weight's gradient is ``<A[r], d_act[r]>``, and
    ``d_act`` becomes ``w * A``.

    Args:
        h: (N, 2F) for gated names, else (N, F).
        d_act: (N, F), contiguous, the gradient that A would have if all weights were 1.
        weights: N numbers, of any shape.
        order: (N,) int64, or None.
        name: the activation.

    Returns:
        ``d_h`` like ``h`` and ``d_weights`` like ``weights``.
    """
    if weights.dtype == torch.float32 and (library := native(h, d_act, weights)) is not None:
        return library.activation_backward_(  # type: ignore[no-any-return]
            h.contiguous(), d_act, weights.contiguous(), order, name
        )
    acc = accumulation_dtype(h.dtype)
    flat = weights.reshape(-1)
    w = (flat if order is None else flat.index_select(0, order)).to(acc).unsqueeze(-1)
    grad, pre = d_act.to(acc), h.to(acc)
    gate, up = pre.chunk(2, dim=-1) if is_gated(name) else (pre, None)
    bent = apply_activation(gate, GATED.get(name, name))
    value = bent if up is None else bent * up
    scaled = w * grad
    d_gate = _plain_backward(scaled if up is None else scaled * up, gate, GATED.get(name, name))
    d_h = d_gate if up is None else torch.cat((d_gate, scaled * bent), dim=-1)
    dots = (value * grad).sum(dim=-1).to(weights.dtype)
    if order is None:
        d_weights = dots
    else:
        d_weights = torch.empty_like(dots)
        d_weights[order] = dots  # each element once
    d_act.copy_(w * value)
    return d_h.to(h.dtype), d_weights.view(weights.shape)


def zero_empty_experts_(grad: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Zeros the slices ``grad[e]`` of the experts without tokens, whatever they hold.

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


def _tokens_of(order: Tensor, top_k: int) -> Tensor:
    return order if top_k == 1 else torch.div(order, top_k, rounding_mode="floor")


def _plain_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
    return torch.ops.aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]
