"""Top-k selection, token counts per expert, and the expert-major order of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.ops.native import MAX_EXPERTS, TRACED_NAMESPACE, native

MAX_TOP_K = 32
"""Largest number of experts per token that the routing kernel supports."""

_traced = getattr(torch.ops, TRACED_NAMESPACE)  # traced_routing.py registers them


@dataclass(frozen=True)
class ExpertOrder:
    """A stable order of the T*K (token, slot) pairs by expert, then token, then slot.

    Some pairs may have no row, as if their slot chose no expert: see :meth:`first`.

    Example with T=3, K=2 and ``expert_ids = [[1, 0], [1, 2], [0, 1]]``: flat pairs 0..5 go to
    experts 1 0 1 2 0 1, so ``order = [1, 4, 0, 2, 5, 3]`` (pairs of expert 0, then 1, then 2),
    ``inverse = [2, 0, 3, 5, 1, 4]`` and ``tokens_per_expert = [2, 3, 1]``.

    Attributes:
        order: (N,) int64, the pair in each expert-major row; N = T*K if all pairs have one.
        inverse: (T*K,) int64, the row of each pair; -1 for a pair without one.
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, the row at which each expert ends: the running sum of the counts.
    """

    order: Tensor
    inverse: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor

    @property
    def has_all_pairs(self) -> bool:
        """Whether each pair has a row."""
        return self.order.shape == self.inverse.shape

    def first(self, num_experts: int, rows: int) -> ExpertOrder:
        """The order of the pairs of the first experts alone; the others have no row.

        Args:
            num_experts: how many experts.
            rows: how many pairs they have, N.
        """
        inverse = self.inverse
        if rows < inverse.shape[0]:
            inverse = inverse.masked_fill(inverse >= rows, -1)
        return ExpertOrder(
            self.order[:rows],
            inverse,
            self.tokens_per_expert[:num_experts],
            self.offsets[:num_experts],
        )


def top_k(scores: Tensor, k: int, tie_break: Tensor | None = None) -> Tensor:
    """The ``k`` best experts of each token, best first, ties to the lower expert id.

    Uses a stable sort, since E is small: the order of ties in ``torch.topk`` is undefined and
    differs between devices.

    Args:
        scores: (T, E), any floating dtype.
        k: experts per token.
        tie_break: (T, E); among equal scores the one with the larger entry comes first. For scores
            that round different logits to the same number, as sigmoids far from zero do.

    Returns:
        (T, K) int64.
    """
    if tie_break is None:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]
    order = torch.sort(tie_break, dim=-1, descending=True, stable=True).indices
    return torch.gather(order, 1, top_k(torch.gather(scores, 1, order), k))


def order_by_expert(expert_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts (token, slot) pairs by expert, without atomics and without a host sync.

    Args:
        expert_ids: (T, K) or (N,) int64, each in ``[0, num_experts)``.
        num_experts: E.

    Returns:
        The order, its inverse and the counts.
    """
    flat = expert_ids.reshape(-1)
    if torch.compiler.is_dynamo_compiling():
        return ExpertOrder(*_traced.order_by_expert(flat, num_experts))
    library = native(flat)
    if library is not None and num_experts <= MAX_EXPERTS:
        return ExpertOrder(*library.sort_by_expert(flat.contiguous(), num_experts, num_experts))
    sorted_ids, order = torch.sort(flat, stable=True)
    # Every index occurs once, so this scatter writes each slot exactly once: deterministic.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.searchsorted(
        sorted_ids, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    )
    return ExpertOrder(order, inverse, edges[1:] - edges[:-1], edges[1:].to(torch.int32))


def order_of_held(expert_ids: Tensor, num_held: int, rows: int) -> ExpertOrder:
    """:func:`order_by_expert` of pairs of which some are other ranks'; these have no row.

    Args:
        expert_ids: (T, K) or (N,) int64, in ``[0, num_held]``; ``num_held`` for other ranks'.
        num_held: e.
        rows: how many pairs are this rank's, or more: the order then has that many, of which the
            last mean nothing.
    """
    flat = expert_ids.reshape(-1)
    library = native(flat)
    if library is None or num_held >= MAX_EXPERTS:
        every = order_by_expert(flat, num_held + 1)
        inverse = every.inverse.masked_fill(flat == num_held, -1)
        order, counts, offsets = every.order, every.tokens_per_expert, every.offsets
    else:
        order, inverse, counts, offsets = library.sort_by_expert(
            flat.contiguous(), num_held + 1, num_held
        )
    return ExpertOrder(order[:rows], inverse, counts[:num_held], offsets[:num_held])


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
        ctx.save_for_backward(logits, weights, expert_ids)
        ctx.options = (normalize, sigmoid)
        ctx.mark_non_differentiable(expert_ids)
        ctx.set_materialize_grads(False)
        return scores, weights, expert_ids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, weights, expert_ids = ctx.saved_tensors
        d_logits = score_top_k_backward(
            logits, weights, expert_ids, grads[0], grads[1], *ctx.options
        )
        return d_logits, None, None, None, None, None


def score_top_k_backward(
    logits: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    normalize: bool,
    sigmoid: bool = False,
) -> Tensor | None:
    """The gradient of the logits of :func:`softmax_top_k` or :func:`sigmoid_top_k`.

    Stable for all logits: nothing is divided by a score, and ``1 - sigmoid(x)`` is computed as
    ``sigmoid(-x)``.

    Args:
        logits: (T, E).
        weights: (T, K), as the forward pass returned them.
        expert_ids: (T, K).
        d_scores: (T, E), or None for zeros.
        d_weights: (T, K), or None for zeros.
        normalize: as in the forward pass.
        sigmoid: whether an expert's score is its sigmoid.

    Returns:
        (T, E), or None if both gradients are None.
    """
    given = [grad for grad in (d_scores, d_weights) if grad is not None]
    if not given:
        return None
    if (
        _fits(logits, weights.shape[-1])
        and (library := native(logits, weights, *given)) is not None
    ):
        if d_scores is not None and d_scores.shape[0] and d_scores.stride(0) == 0:
            d_scores = d_scores[0]  # the same for all tokens, as a balancing loss gives it
        d_scores, d_weights = (
            None if grad is None else grad.contiguous() for grad in (d_scores, d_weights)
        )
        d_logits: Tensor = library.route_backward(
            logits.contiguous(), weights, expert_ids, d_scores, d_weights, normalize, sigmoid
        )
        return d_logits
    through_scores, to_chosen = d_scores, None
    if d_weights is not None:
        on_chosen = d_weights
        if normalize:  # a softmax of the logarithms of the chosen scores
            inner = (weights * d_weights).sum(dim=-1, keepdim=True)
            on_chosen = weights * (d_weights - inner)
        elif sigmoid:
            on_chosen = weights * d_weights
        if sigmoid:
            on_chosen = on_chosen * torch.sigmoid(-torch.gather(logits, 1, expert_ids))
        # The K experts of a token differ, so nothing is written twice.
        scattered = torch.zeros_like(logits).scatter(1, expert_ids, on_chosen)
        if normalize or sigmoid:
            to_chosen = scattered
        else:
            through_scores = scattered if d_scores is None else d_scores + scattered
    if through_scores is None:
        return to_chosen
    scores = torch.softmax(_log_scores(logits, sigmoid), dim=-1)
    grad = scores * (through_scores - (scores * through_scores).sum(dim=-1, keepdim=True))
    if sigmoid:
        grad = grad * torch.sigmoid(-logits)
    return grad if to_chosen is None else grad + to_chosen


def _fits(logits: Tensor, k: int) -> bool:
    """Whether the kernels support this dtype, number of experts, and experts per token."""
    return logits.dtype == torch.float32 and logits.shape[-1] <= MAX_EXPERTS and k <= MAX_TOP_K


def _log_scores(logits: Tensor, sigmoid: bool) -> Tensor:
    """The logarithms of the scores, up to a constant per token; unlike scores, can't underflow."""
    return F.logsigmoid(logits) if sigmoid else logits


def softmax_top_k(
    logits: Tensor, k: int, normalize: bool, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts, the ``k`` best of each token, and their weights.

    Normalised weights are ratios of scores, computed from the logits, so they are right even where
    scores underflow.

    Args:
        logits: (T, E).
        k: experts per token.
        normalize: divide the chosen scores by their sum.
        selection_bias: (E,), added to the scores for selection only: it doesn't affect the weights
            and gets no gradient.

    Returns:
        ``scores (T, E)``, ``weights (T, K)`` and ``expert_ids (T, K)`` int64, in descending order
        of the biased score, ties to the larger logit, then to the lower expert id: K distinct
        experts in ``[0, E)``, even for a row of NaN.
    """
    return _score_top_k(logits, k, normalize, selection_bias, sigmoid=False)


def sigmoid_top_k(
    logits: Tensor, k: int, normalize: bool, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`softmax_top_k` with each expert's sigmoid as its score (DeepSeek-V3).

    Args:
        logits: (T, E).
        k: experts per token.
        normalize: divide the chosen sigmoids by their sum.
        selection_bias: (E,), added to the sigmoids for selection only.

    Returns:
        As :func:`softmax_top_k`: the scores are the sigmoids divided by their sum over all E, so
        that each row is a distribution; unnormalised weights are the sigmoids themselves.
    """
    return _score_top_k(logits, k, normalize, selection_bias, sigmoid=True)


def _score_top_k(
    logits: Tensor, k: int, normalize: bool, selection_bias: Tensor | None, sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if selection_bias is None else selection_bias.detach()
    if logits.is_cuda and torch.compiler.is_dynamo_compiling():
        return _traced.score_top_k(logits, bias, k, normalize, sigmoid)  # type: ignore[no-any-return]
    fits = _fits(logits, k) and (bias is None or bias.dtype == torch.float32)
    if fits and (library := native(logits.detach())) is not None:
        bias = None if bias is None else bias.contiguous()
        routed: tuple[Tensor, Tensor, Tensor] = _ScoreTopK.apply(
            logits, bias, k, normalize, sigmoid, library
        )
        return routed
    log_scores = _log_scores(logits, sigmoid)
    scores = torch.softmax(log_scores, dim=-1)
    raw = logits.detach()
    if bias is None:  # the order of the scores, without their rounding
        expert_ids = top_k(raw, k)
    else:
        expert_ids = top_k((torch.sigmoid(raw) if sigmoid else scores.detach()) + bias, k, raw)
    if normalize:
        weights = torch.softmax(torch.gather(log_scores, 1, expert_ids), dim=-1)
    elif sigmoid:
        weights = torch.sigmoid(torch.gather(logits, 1, expert_ids))
    else:
        weights = torch.gather(scores, 1, expert_ids)
    return scores, weights, expert_ids
