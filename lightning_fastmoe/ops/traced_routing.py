"""What a router does around its product, as operators for ``torch.compile``.

Traced as PyTorch's operators, choosing experts means sorting all scores, and ordering pairs means
another sort; both take a GPU much longer than this package's kernels. So there a graph has an
operator for each kernel of :mod:`~lightning_fastmoe.ops.routing` and
:mod:`~lightning_fastmoe.ops.balancing`, with the results of those modules. On a CPU that holds for
the order of pairs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import routing
from lightning_fastmoe.ops.balancing import are_supported, differentiable_backward
from lightning_fastmoe.ops.native import TRACED_NAMESPACE, native
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator


@operator(f"{TRACED_NAMESPACE}::score_top_k")
def score_top_k(
    logits: Tensor, bias: Tensor | None, k: int, normalize: bool, sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~lightning_fastmoe.ops.routing.softmax_top_k` or, with ``sigmoid``, ``sigmoid_top_k``.

    Returns:
        ``scores (T, E)``, ``weights (T, K)`` and ``expert_ids (T, K)`` int64.
    """
    choose = routing.sigmoid_top_k if sigmoid else routing.softmax_top_k
    with torch.no_grad():
        scores, weights, expert_ids = choose(logits, k, normalize, bias)
    return scores, weights, expert_ids.contiguous()


@operator(f"{TRACED_NAMESPACE}::score_top_k_backward")
def score_top_k_backward(
    logits: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    normalize: bool,
    sigmoid: bool,
) -> Tensor:
    """The gradient of the logits (T, E); one of the given gradients may be None."""
    with torch.no_grad():
        found = routing.score_top_k_backward(
            logits, weights, expert_ids, d_scores, d_weights, normalize, sigmoid
        )
    assert found is not None
    return found.contiguous()


@fake_of(score_top_k)
def _(
    logits: Tensor, bias: Tensor | None, k: int, normalize: bool, sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = logits.new_empty(logits.shape[0], k)
    return _empty_like(logits), weights, torch.empty_like(weights, dtype=torch.int64)


@fake_of(score_top_k_backward)
def _(logits: Tensor, *rest: Any) -> Tensor:
    return _empty_like(logits)


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weights, expert_ids = output
    ctx.save_for_backward(inputs[0], weights, expert_ids)
    ctx.normalize, ctx.sigmoid = inputs[3:]
    ctx.mark_non_differentiable(expert_ids)
    ctx.set_materialize_grads(False)


def _scores_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_scores, d_weights, _ = grads
    d_logits = None
    if d_scores is not None or d_weights is not None:
        d_logits = score_top_k_backward(
            *ctx.saved_tensors, d_scores, d_weights, ctx.normalize, ctx.sigmoid
        )
    return d_logits, None, None, None, None


differentiate(score_top_k, _scores_backward, setup_context=_save_scores)


@operator(f"{TRACED_NAMESPACE}::order_by_expert")
def order_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~lightning_fastmoe.ops.routing.order_by_expert` of ids (N,).

    Returns:
        The fields of an :class:`~lightning_fastmoe.ops.routing.ExpertOrder`.
    """
    found = routing.order_by_expert(expert_ids, num_experts)
    return found.order, found.inverse, found.tokens_per_expert, found.offsets


@fake_of(order_by_expert)
def _(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.empty_like(expert_ids, dtype=torch.int64)
    counts = order.new_empty(num_experts)
    return order, torch.empty_like(order), counts, torch.empty_like(counts, dtype=torch.int32)


@operator(f"{TRACED_NAMESPACE}::balancing_losses")
def balancing_losses(
    scores: Tensor, logits: Tensor, counts: Tensor, of_balancing: float, of_z: float
) -> tuple[Tensor, Tensor]:
    """:func:`~lightning_fastmoe.ops.balancing.balancing_losses` in the dtype of the scores.

    Returns:
        (3,): the load-balancing loss, the z-loss, and their sum with coefficients; a coefficient of
        0 makes its loss 0. And (E,): each expert's share of the counts.
    """
    library = native(scores.detach(), logits.detach(), counts)
    if library is not None and are_supported(scores, logits):
        given = scores.contiguous(), logits.contiguous(), counts.contiguous()
        values, share = library.balancing_losses(*given, of_balancing, of_z)
        return values, share
    tokens, num_experts = scores.shape
    share = counts.to(scores.dtype)
    share = share / share.sum().clamp_min(1)
    balancing = (share * scores.sum(0)).sum() * (num_experts / max(tokens, 1))
    z = torch.logsumexp(logits, 1).square().sum() / max(tokens, 1)
    losses = [balancing * (of_balancing > 0), z * (of_z > 0)]
    return torch.stack([*losses, of_balancing * losses[0] + of_z * losses[1]]), share


@operator(f"{TRACED_NAMESPACE}::balancing_losses_backward")
def balancing_losses_backward(
    grad: Tensor, logits: Tensor, share: Tensor, of_balancing: float, of_z: float
) -> tuple[Tensor, Tensor]:
    """The gradients of the scores, (E,) for each token, and of the logits (T, E).

    The latter has no rows if ``of_z`` is 0.
    """
    library = native(grad.detach(), logits.detach(), share)
    if library is not None and are_supported(logits, logits):
        d_scores, d_logits = library.balancing_losses_backward(
            logits.contiguous(), share, *grad.contiguous().unbind(), of_balancing, of_z
        )
    else:
        d_scores, d_logits = differentiable_backward(
            logits, share, list(grad.unbind()), of_balancing, of_z
        )
    return d_scores, d_logits if of_z > 0 else logits.new_empty(0, logits.shape[1])


@fake_of(balancing_losses)
def _(scores: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(3), scores.new_empty(scores.shape[1])


@fake_of(balancing_losses_backward)
def _(
    grad: Tensor, logits: Tensor, share: Tensor, of_balancing: float, of_z: float
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] if of_z > 0 else 0
    return torch.empty_like(share), logits.new_empty(rows, logits.shape[1])


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logits, _, ctx.of_balancing, ctx.of_z = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _losses_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 5
    logits, share = ctx.saved_tensors
    d_scores, d_logits = balancing_losses_backward(
        grads[0], logits, share, ctx.of_balancing, ctx.of_z
    )
    return (
        d_scores.expand_as(logits) if ctx.of_balancing > 0 else None,
        d_logits if ctx.of_z > 0 else None,
        *(None,) * 3,
    )


differentiate(balancing_losses, _losses_backward, setup_context=_save_losses)


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)
