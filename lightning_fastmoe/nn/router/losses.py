"""Losses on a router's output. All are fp32 scalars (fp64 for fp64), and zero for zero tokens.

Each is a mean over this rank's micro-batch, as if each rank added the term to its own loss; the
loss of the global batch is then the mean over ranks. Only :func:`global_load_balancing_loss` uses
other ranks' tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.nn.router.routing import Routing, RoutingContext, count_experts
from lightning_fastmoe.ops import traced_routing
from lightning_fastmoe.ops.balancing import are_supported, balancing_losses


def load_balancing_loss(routing: Routing) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when the router is uniform, E when one expert gets everything.

    ``f_e`` is the share of (token, slot) pairs that chose expert e (no gradient), ``P_e`` the mean
    score of e (Switch Transformer, eq. 4-6). GShard's router sets ``routing.balanced_slots`` to 1:
    then f counts only first choices. Computed over the tokens of this rank's micro-batch, as if
    each rank added the term to its own loss. Dropped pairs count: they were chosen.
    """
    loss: Tensor = _LoadBalancing.apply(routing.scores, routing.balanced_counts())
    return loss


class _LoadBalancing(torch.autograd.Function):
    """The load-balancing loss of ``scores (T, E)`` and ``counts (E,)``, with its gradient.

    A step consists of few large kernels and many of these small ones: as a function it takes half
    as many, and no graph of them is recorded.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, counts: Tensor) -> Tensor:
        tokens, num_experts = scores.shape
        counts = counts.to(scores.dtype)
        share = counts / counts.sum().clamp_min(1)
        ctx.save_for_backward(share)
        ctx.tokens, ctx.factor = tokens, num_experts / max(tokens, 1)
        loss: Tensor = (share * scores.sum(dim=0)).sum() * ctx.factor
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return (share * (grads[0] * ctx.factor)).expand(ctx.tokens, -1), None


def z_loss(routing: Routing) -> Tensor:
    """``mean_t (logsumexp_e logits[t, e])^2``, which keeps logits small (ST-MoE, eq. 5)."""
    tokens = max(routing.logits.shape[0], 1)
    total: Tensor = _LogSumExp.apply(routing.logits)
    return total.square().sum() / tokens


class _LogSumExp(torch.autograd.Function):
    """Logsumexp over the last dimension, with the softmax as its gradient.

    PyTorch computes the gradient as exp(x - result), where the rounding error of a large result
    becomes a factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.logsumexp(x, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * torch.softmax(x, dim=-1)


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the experts' importance, the sums of their scores (Shazeer et al. 2017, eq. 7).

    CV^2 is variance over squared mean. For noisy top-k the scores are the gates, zero where an
    expert wasn't chosen, as in the paper.
    """
    return _cv_squared(routing.scores.sum(dim=0))


def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the experts' smooth loads (Shazeer et al. 2017, eq. 11); zero without noise."""
    if routing.load is None:
        return routing.logits.sum() * 0.0
    return _cv_squared(routing.load.sum(dim=0))


def sequence_load_balancing_loss(routing: Routing, context: RoutingContext) -> Tensor:
    """The load-balancing loss of each sequence, averaged over sequences (DeepSeek-V3, eq. 17-20).

    ``mean_s E * sum_e f_se P_se``, with share and mean score over the tokens of sequence s;
    sequences without tokens are left out. Sequences are given by ``sequence_ids``, or else are the
    entries of the input's first dimension (a 2-dimensional input is one sequence). Independent of
    how sequences are divided over ranks and micro-batches, if each gets the same number.
    """
    scores = routing.scores
    tokens, num_experts = scores.shape
    groups, n = context.grid or (1, tokens)
    chosen = torch.zeros_like(scores)
    slots = torch.ones_like(routing.expert_ids, dtype=scores.dtype)
    if routing.active is not None:
        slots = routing.active.to(scores.dtype)
    for k in range(slots.shape[1])[
        : routing.balanced_slots
    ]:  # one by one: a token may have chosen an expert twice
        chosen = chosen + torch.zeros_like(scores).scatter(
            1, routing.expert_ids[:, k : k + 1], slots[:, k : k + 1]
        )
    valid = scores.new_ones(tokens, 1)
    if context.sequence_ids is not None:
        sizes = count_experts(context.sequence_ids, groups * n)
        length, picked, total = (_sum_runs(t, sizes) for t in (valid, chosen, scores))
    else:
        if context.positions is not None:
            scores, chosen, valid = (
                t.new_zeros(groups * n, t.shape[1]).index_copy(0, context.positions, t)
                for t in (scores, chosen, valid)
            )
        length, picked, total = (
            t.view(groups, n, t.shape[1]).sum(dim=1) for t in (valid, chosen, scores)
        )
    length = length.squeeze(1)
    share = picked / picked.sum(dim=1, keepdim=True).clamp_min(1)
    mean = total / length.clamp_min(1).unsqueeze(1)
    full = (length > 0).to(scores.dtype)
    per_sequence = num_experts * (share * mean).sum(dim=1)
    return (per_sequence * full).sum() / full.sum().clamp_min(1)


def global_load_balancing_loss(routing: Routing, context: RoutingContext) -> Tensor:
    """The load-balancing loss over the tokens of all ranks ("Demons in the detail", 2025).

    The shares f are those of the global batch; the mean score P is this rank's contribution to the
    global mean, times the number of ranks. So the mean over ranks is ``E * sum_e f_e P_e`` of the
    global batch, even if ranks hold different numbers of tokens. Experts are balanced only over the
    whole batch, so they may specialise in a domain. Exchanges E + 1 counts over all ranks once per
    forward pass.
    """
    scores = routing.scores
    tokens, num_experts = scores.shape
    own = torch.cat([routing.balanced_counts(), scores.new_full((1,), tokens, dtype=torch.int64)])
    table = context.batch.gather_counts(own, context.layer)
    totals = table.sum(dim=0).to(device=scores.device, dtype=scores.dtype)
    share = totals[:-1] / totals[:-1].sum().clamp_min(1)
    mean_score = scores.sum(dim=0) * context.batch.size / totals[-1].clamp_min(1)
    return num_experts * (share * mean_score).sum()


@dataclass(frozen=True)
class Loss:
    """One of the losses that a layer can attach.

    Attributes:
        function: computes the loss, a scalar, from a routing and the context of the pass.
        coefficient: the default coefficient, for routers that enable the loss by default.
        token_choice: whether the loss applies to every router that gives each token K experts. If
            not, routers opt in through their ``losses``.
        uses_batch: whether it exchanges counts with the other ranks.
    """

    function: Callable[[Routing, RoutingContext], Tensor]
    coefficient: float
    token_choice: bool = True
    uses_batch: bool = False


LOSSES = {
    "load_balancing": Loss(lambda routing, context: load_balancing_loss(routing), 0.01),
    "z_loss": Loss(lambda routing, context: z_loss(routing), 0.001),
    "importance": Loss(lambda routing, context: importance_loss(routing), 0.1),
    "load": Loss(lambda routing, context: load_loss(routing), 0.1, token_choice=False),
    "sequence_balancing": Loss(sequence_load_balancing_loss, 0.0),
    "global_balancing": Loss(global_load_balancing_loss, 0.0, uses_batch=True),
}
"""The losses by the names of their coefficients among the arguments of ``MoE``."""

TOKEN_CHOICE_LOSSES = frozenset(name for name, loss in LOSSES.items() if loss.token_choice)
"""The losses that apply to any router that gives each token K experts."""


def loss_value(name: str, routing: Routing, context: RoutingContext) -> Tensor:
    """The value of the loss ``name`` of :data:`LOSSES`."""
    return LOSSES[name].function(routing, context)


_FUSED = frozenset({"load_balancing", "z_loss"})


def loss_values(
    coefficients: dict[str, float], routing: Routing, context: RoutingContext
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The values of losses, by kernels of this package where there are any.

    Args:
        coefficients: name -> coefficient, of those that are wanted.
        routing: of a pass.
        context: of the same.

    Returns:
        Name -> value, without the coefficient; and their sum with coefficients if it came with
        them.
    """
    if coefficients and _FUSED.issuperset(coefficients):
        pair = (coefficients.get("load_balancing", 0.0), coefficients.get("z_loss", 0.0))
        found = balancing_losses(routing.scores, routing.logits, routing.balanced_counts(), *pair)
        if found is not None:
            by_name = {"load_balancing": found[0], "z_loss": found[1]}
            return {name: by_name[name] for name in coefficients}, found[2]
    return {name: LOSSES[name].function(routing, context) for name in coefficients}, None


def loss_values_in_graph(
    coefficients: dict[str, float], routing: Routing, context: RoutingContext
) -> tuple[dict[str, Tensor], Tensor | None]:
    """:func:`loss_values` as a compiler traces it."""
    logits = routing.logits
    is_fused = len(coefficients) > 0 and _FUSED.issuperset(coefficients) and logits.is_cuda
    if is_fused and are_supported(routing.scores, logits):
        pair = (coefficients.get("load_balancing", 0.0), coefficients.get("z_loss", 0.0))
        counts = routing.balanced_counts()
        found, _ = traced_routing.balancing_losses(routing.scores, logits, counts, *pair)
        by_name = {"load_balancing": found[0], "z_loss": found[1]}
        return {name: by_name[name] for name in coefficients}, found[2]
    return {name: LOSSES[name].function(routing, context) for name in coefficients}, None


def _sum_runs(rows: Tensor, sizes: Tensor) -> Tensor:
    """Sums of consecutive runs of ``rows (T, n)``, of lengths ``sizes (G,)``: (G, n).

    Not by ``index_add``, whose order of additions varies between calls on CUDA.
    """
    sums: Tensor = torch.segment_reduce(rows, "sum", lengths=sizes, axis=0, unsafe=True)
    return sums


def _cv_squared(values: Tensor) -> Tensor:
    # Divided before squaring, which could underflow. A zero mean means that all values are zero.
    ratios = values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
    return ratios.var(correction=0)
