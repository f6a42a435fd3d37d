"""Which expert gets which token: top-k, tokens_per_expert, and the expert-major order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import native

MAX_EXPERTS = 1024
"""Most experts of one layer that the kernels take; beyond, PyTorch's operators compute."""

MAX_TOP_K = 32
"""Most experts per token that the routing kernel takes."""


@dataclass(frozen=True)
class ExpertOrder:
    """A stable order of the T*K (token, slot) pairs by expert, then token, then slot.

    Example with T=3, K=2 and ``expert_ids = [[1, 0], [1, 2], [0, 1]]``: flat pairs 0..5 go to
    experts 1 0 1 2 0 1, so ``order = [1, 4, 0, 2, 5, 3]`` (pairs of expert 0, then 1, then 2),
    ``inverse = [2, 0, 3, 5, 1, 4]`` and ``tokens_per_expert = [2, 3, 1]``.

    Attributes:
        order: (T*K,) int64, the pair that stands in each expert-major row.
        inverse: (T*K,) int64, the row of each pair.
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, the row at which each expert ends: the running sum of the counts.
    """

    order: Tensor
    inverse: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best experts of each token, best first, ties to the lower expert id.

    ``torch.topk`` leaves the order of ties open (and it differs between devices); a stable sort
    does not, and E is small.

    Args:
        scores: (T, E), any floating dtype.
        k: experts per token.

    Returns:
        (T, K) int64.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def order_by_expert(expert_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts (token, slot) pairs by expert, without atomics and without a host sync.

    Args:
        expert_ids: (T, K) or (N,) int64, each in ``[0, num_experts)``.
        num_experts: E.

    Returns:
        The order, its inverse and the counts.
    """
    flat = expert_ids.reshape(-1)
    library = native(flat)
    if library is not None and num_experts <= MAX_EXPERTS:
        return ExpertOrder(*library.sort_by_expert(flat.contiguous(), num_experts))
    sorted_ids, order = torch.sort(flat, stable=True)
    # Every index occurs once, so this scatter writes each slot exactly once: deterministic.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.searchsorted(
        sorted_ids, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    )
    return ExpertOrder(order, inverse, edges[1:] - edges[:-1], edges[1:].to(torch.int32))


class _ScoreTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        selection_bias: Tensor | None,
        k: int,
        normalize: bool,
        sigmoid: bool,
        library: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, weights, expert_ids = library.route(
            logits.contiguous(), selection_bias, k, normalize, sigmoid
        )
        ctx.save_for_backward(scores, expert_ids)
        ctx.options = (normalize, sigmoid)
        ctx.mark_non_differentiable(expert_ids)
        ctx.set_materialize_grads(False)
        return scores, weights, expert_ids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, expert_ids = ctx.saved_tensors
        d_logits = score_top_k_backward(scores, expert_ids, grads[0], grads[1], *ctx.options)
        return d_logits, None, None, None, None, None


def score_top_k_backward(
    scores: Tensor,
    expert_ids: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    normalize: bool,
    sigmoid: bool = False,
) -> Tensor | None:
    """The gradient of the logits of :func:`softmax_top_k` or :func:`sigmoid_top_k`.

    Args:
        scores: (T, E).
        expert_ids: (T, K).
        d_scores: (T, E), or None for zeros.
        d_weights: (T, K), or None for zeros.
        normalize: as in the forward pass.
        sigmoid: whether the scores are sigmoids.

    Returns:
        (T, E), or None if both gradients are None.
    """
    given = [grad for grad in (d_scores, d_weights) if grad is not None]
    if not given:
        return None
    if (library := native(scores, *given)) is not None:
        d_scores, d_weights = (
            None if grad is None else grad.contiguous() for grad in (d_scores, d_weights)
        )
        d_logits: Tensor = library.route_backward(
            scores, expert_ids, d_scores, d_weights, normalize, sigmoid
        )
        return d_logits
    grad = torch.zeros_like(scores) if d_scores is None else d_scores
    if d_weights is not None:
        if normalize:
            chosen = torch.gather(scores, 1, expert_ids)
            total = chosen.sum(dim=-1, keepdim=True)
            inner = (d_weights * chosen / total).sum(dim=-1, keepdim=True)
            d_weights = (d_weights - inner) / total
        # The K experts of a token differ, so nothing is written twice.
        grad = grad + torch.zeros_like(scores).scatter(1, expert_ids, d_weights)
    if sigmoid:
        return scores * (1 - scores) * grad
    return scores * (grad - (scores * grad).sum(dim=-1, keepdim=True))


def softmax_top_k(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts, the ``k`` best of each token, and their weights.

    Args:
        logits: (T, E).
        k: experts per token.
        normalize: divide the chosen scores by their sum.

    Returns:
        ``scores (T, E)``, ``weights (T, K)`` (best first, ties to the lower expert id) and
        ``expert_ids (T, K)`` int64: K distinct experts of ``[0, E)``, also for a row of NaN.
    """
    return _score_top_k(logits, k, normalize, None, sigmoid=False)


def sigmoid_top_k(
    logits: Tensor, k: int, normalize: bool, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`softmax_top_k` with each expert's sigmoid as its score (DeepSeek-V3).

    Args:
        logits: (T, E).
        k: experts per token.
        normalize: divide the chosen scores by their sum.
        selection_bias: (E,), added to the scores for the choice alone: it has no part in the
            weights and gets no gradient.

    Returns:
        As :func:`softmax_top_k`; experts stand in descending order of the biased score.
    """
    return _score_top_k(logits, k, normalize, selection_bias, sigmoid=True)


def _score_top_k(
    logits: Tensor, k: int, normalize: bool, selection_bias: Tensor | None, sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if selection_bias is None else selection_bias.detach()
    fits = logits.dtype == torch.float32 and logits.shape[-1] <= MAX_EXPERTS and k <= MAX_TOP_K
    fits = fits and (bias is None or bias.dtype == torch.float32)
    if fits and (library := native(logits.detach())) is not None:
        bias = None if bias is None else bias.contiguous()
        routed: tuple[Tensor, Tensor, Tensor] = _ScoreTopK.apply(
            logits, bias, k, normalize, sigmoid, library
        )
        return routed
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
    ranked = scores.detach()
    expert_ids = top_k(ranked if bias is None else ranked + bias, k)
    weights = torch.gather(scores, 1, expert_ids)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return scores, weights, expert_ids
