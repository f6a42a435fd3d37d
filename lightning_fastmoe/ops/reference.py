"""Slow, obvious definitions of one MoE layer: the reference for tests and documentation.

Nothing here is vectorised over experts and nothing is fast. Every function works in the dtype of
its input (the tests use fp64) and is differentiable by plain autograd.
Shapes: T tokens, D d_model, F d_ffn, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops.activation import GATED


def softmax_top_k(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights and expert ids of softmax top-k routing, one token at a time.

    Ties go to the larger logit, then to the lower expert id.

    Args:
        logits: (T, E).
        top_k: experts per token.
        normalize: divide the chosen scores by their sum.

    Returns:
        ``scores (T, E)``, ``weights (T, K)``, ``expert_ids (T, K)``.
    """
    scores = torch.softmax(logits, dim=1)
    return _choose(logits, scores, scores, scores, top_k, normalize)


def sigmoid_top_k(
    logits: Tensor, top_k: int, normalize: bool, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`softmax_top_k` with sigmoid scores; the bias affects only the selection.

    Args:
        logits: (T, E).
        top_k: experts per token.
        normalize: divide the chosen sigmoids by their sum.
        selection_bias: (E,) or None.

    Returns:
        ``scores (T, E)``, the sigmoids divided by each token's sum; ``weights (T, K)``,
        ``expert_ids (T, K)``.
    """
    raw = torch.sigmoid(logits)
    ranked = raw if selection_bias is None else raw + selection_bias
    # Ratios of sigmoids via logarithms, because sigmoids may underflow to zero.
    log_raw = torch.nn.functional.logsigmoid(logits)
    return _choose(log_raw, torch.softmax(log_raw, dim=1), raw, ranked, top_k, normalize)


def _choose(
    log_raw: Tensor, scores: Tensor, raw: Tensor, ranked: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts with the largest ``ranked``, ties to the larger ``log_raw``, weighted by ``raw``.

    Normalised weights are ``raw / sum of the chosen raw``, computed via logarithms.
    """
    num_tokens = scores.shape[0]
    expert_ids = torch.zeros(num_tokens, top_k, dtype=torch.long)
    for t in range(num_tokens):
        keys = zip(ranked[t].tolist(), log_raw[t].tolist(), strict=True)
        best_first = sorted((-value, -tie, e) for e, (value, tie) in enumerate(keys))
        expert_ids[t] = torch.tensor([e for _, _, e in best_first[:top_k]])
    weights = torch.gather(raw, 1, expert_ids)
    if normalize:
        weights = torch.softmax(torch.gather(log_raw, 1, expert_ids), dim=1)
    return scores, weights, expert_ids


def activation(h: Tensor, name: str) -> Tensor:
    """The activation of one expert; gated ones split their input into (gate, up) halves."""
    if name == "clamped_swiglu":
        gate, up = h.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if name in GATED:
        gate, up = h.chunk(2, dim=-1)
        return activation(gate, GATED[name]) * up
    if name == "silu":
        return h / (1 + torch.exp(-h))
    if name == "gelu":
        return 0.5 * h * (1 + torch.erf(h / 2**0.5))
    if name == "relu":
        return torch.where(h > 0, h, torch.zeros_like(h))
    raise NotImplementedError(f"the reference has no activation {name!r}")


def expert_ffn(
    x: Tensor, up: Tensor, down: Tensor, name: str, up_bias: Tensor | None, down_bias: Tensor | None
) -> Tensor:
    """One expert on ``x (n, D)``: ``down @ act(up @ x + up_bias) + down_bias``."""
    h = x @ up.T
    if up_bias is not None:
        h = h + up_bias
    y = activation(h, name) @ down.T
    return y if down_bias is None else y + down_bias


def moe(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    up: Tensor,
    down: Tensor,
    name: str = "swiglu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """A dropless MoE layer, one (token, slot) pair at a time: ``y[t] = sum_k w[t,k] f_e(x[t])``.

    Args:
        x: (T, D) tokens.
        weights: (T, K) combine weights.
        expert_ids: (T, K) chosen experts.
        up: (E, 2F, D) for gated activations, else (E, F, D).
        down: (E, D, F).
        name: the activation.
        up_bias: (E, 2F) or (E, F), or None.
        down_bias: (E, D) or None.

    Returns:
        (T, D).
    """
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for k in range(expert_ids.shape[1]):
            e = int(expert_ids[t, k])
            ub = None if up_bias is None else up_bias[e]
            db = None if down_bias is None else down_bias[e]
            total = (
                total + weights[t, k] * expert_ffn(x[t : t + 1], up[e], down[e], name, ub, db)[0]
            )
        rows.append(total)
    return torch.stack(rows) if rows else x.clone()


def load_balancing_loss(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` (Switch Transformer, eq. 4-6; GShard), 1 for a uniform router.

    ``f_e`` is the share of (token, slot) pairs that go to expert e, ``P_e`` its mean score.
    """
    num_tokens, num_experts = scores.shape
    top_k = expert_ids.shape[1]
    total = scores.new_zeros(())
    for e in range(num_experts):
        f = float((expert_ids == e).sum()) / (num_tokens * top_k)
        total = total + f * scores[:, e].mean()
    return num_experts * total


def z_loss(logits: Tensor) -> Tensor:
    """``mean_t (log sum_e exp logits[t, e])^2`` (ST-MoE, eq. 5)."""
    return torch.logsumexp(logits, dim=1).pow(2).mean()


def sequence_load_balancing_loss(scores: Tensor, expert_ids: Tensor, lengths: list[int]) -> Tensor:
    """The mean of :func:`load_balancing_loss` over sequences of ``lengths`` tokens."""
    terms, start = [], 0
    for n in lengths:
        if n:
            stop = start + n
            terms.append(load_balancing_loss(scores[start:stop], expert_ids[start:stop]))
            start = stop
    return torch.stack(terms).mean()


def quantize_groups(weight: Tensor, bits: int, group: int, stored: torch.dtype) -> Tensor:
    """Each row in groups: values rounded to a multiple of the group's scale, in fp64.

    Args:
        weight: (..., D).
        bits: 8 or 4.
        group: values that share a scale.
        stored: the dtype of scales.

    Returns:
        (2, ..., D) fp64: the integers, and the scales they are multiplied by.
    """
    limit = 2 ** (bits - 1) - 1
    flat = weight.double().flatten(0, -2)
    found = torch.zeros(2, *flat.shape, dtype=torch.float64)
    for r, row in enumerate(flat.tolist()):
        for start in range(0, len(row), group):
            values = row[start : start + group]
            scale = torch.tensor(max(map(abs, values)) / limit, dtype=torch.float64).to(stored)
            step = max(scale.item(), torch.finfo(stored).tiny)
            for i, value in enumerate(values):
                found[0, r, start + i] = round(value / step)
                found[1, r, start + i] = step
    return found.view(2, *weight.shape)
