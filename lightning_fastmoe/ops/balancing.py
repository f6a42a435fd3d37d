"""The load-balancing loss and the z-loss of a router by two kernels, and their gradients by one.

A step consists of few large kernels and many small ones. These losses were some thirty of those for
each layer; as separate operations, they took the host longer than the layer's products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import MAX_EXPERTS, native


def are_supported(scores: Tensor, logits: Tensor) -> bool:
    """Whether the kernels take ``scores (T, E)`` and ``logits (T, E)``."""
    return scores.dtype == logits.dtype == torch.float32 and scores.shape[1] <= MAX_EXPERTS


def balancing_losses(
    scores: Tensor, logits: Tensor, counts: Tensor, of_balancing: float, of_z: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``E * sum_e f_e P_e`` and ``mean_t (logsumexp_e logits[t, e])^2``.

    ``f_e`` is e's share of the counts, without gradient, and ``P_e`` its mean score.

    Args:
        scores: (T, E).
        logits: (T, E).
        counts: (E,) int64.
        of_balancing: the coefficient of the first; 0 leaves it out, and it is 0.
        of_z: that of the second.

    Returns:
        Both, and their sum with the coefficients; each a scalar in fp32. None if the kernels don't
        support the arguments.
    """
    library = native(scores.detach(), logits.detach(), counts)
    if not are_supported(scores, logits) or library is None:
        return None
    found: tuple[Tensor, Tensor, Tensor] = _Losses.apply(
        scores, logits, counts, of_balancing, of_z, library
    )
    return found


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        logits: Tensor,
        counts: Tensor,
        of_balancing: float,
        of_z: float,
        library: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, share = library.balancing_losses(
            scores.contiguous(), logits.contiguous(), counts.contiguous(), of_balancing, of_z
        )
        ctx.save_for_backward(logits, share)
        ctx.coefficients, ctx.library = (of_balancing, of_z), library
        ctx.set_materialize_grads(False)
        balancing, z, total = values.unbind()
        return balancing, z, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, share = ctx.saved_tensors
        of_balancing, of_z = ctx.coefficients
        given = [None if g is None else g.to(torch.float32).contiguous() for g in grads]
        if torch.is_grad_enabled():
            d_scores, d_logits = differentiable_backward(logits, share, given, of_balancing, of_z)
        else:
            d_scores, d_logits = ctx.library.balancing_losses_backward(
                logits.contiguous(), share, *given, of_balancing, of_z
            )
        wanted = of_balancing > 0 and ctx.needs_input_grad[0]
        return (
            d_scores.expand(len(logits), -1) if wanted else None,
            d_logits if of_z > 0 and ctx.needs_input_grad[1] else None,
            *(None,) * 4,
        )


def differentiable_backward(
    logits: Tensor, share: Tensor, grads: list[Tensor | None], of_balancing: float, of_z: float
) -> tuple[Tensor, Tensor]:
    """The gradients of a token's scores and of the logits, for create_graph=True."""
    own_balancing, own_z, total = (share.new_zeros(()) if g is None else g for g in grads)
    tokens, num_experts = max(logits.shape[0], 1), logits.shape[1]
    d_scores = share * ((own_balancing + of_balancing * total) * (num_experts / tokens))
    by_token = (own_z + of_z * total) * 2.0 / tokens * torch.logsumexp(logits, 1, keepdim=True)
    return d_scores, by_token * torch.softmax(logits, 1)
