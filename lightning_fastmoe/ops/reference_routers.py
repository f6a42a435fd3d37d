"""Slow, obvious definitions of routers, capacities and losses; see ``ops/reference.py``.

One token and one expert at a time, in the dtype of the input, differentiable by plain autograd.
Random numbers come in as arguments. Shapes: T tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def best(values: list[float], k: int) -> list[int]:
    """Indices of the ``k`` largest values, largest first, ties to the lower index."""
    return [i for _, i in sorted((-v, i) for i, v in enumerate(values))[:k]]


def softmax(v: Tensor) -> Tensor:
    """The softmax of a vector."""
    powers = torch.exp(v - v.detach().max())
    return powers / powers.sum()


def random_bits(seed: int, stream: int, token: int, column: int) -> int:
    """64 random bits by SplitMix64's mixing function, in Python's integers; as an int64."""
    wrap = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = (seed + (stream + 1) * 0x94D049BB133111EB) & wrap
    start = mix((mix((token * golden + key) & wrap) + key) & wrap)
    bits = mix((start + (column + 1) * golden) & wrap)
    return bits - 2**64 if bits >= 2**63 else bits


def uniform(seed: int, stream: int, token: int, column: int) -> float:
    """The highest 24 of :func:`random_bits` as a number in [0, 1)."""
    return (random_bits(seed, stream, token, column) % 2**64 >> 40) / 2**24


def softmax_after_selection(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest logits of each token and the softmax over them: weights, ids (T, K)."""
    ids = torch.tensor([best(row.tolist(), top_k) for row in logits]).view(-1, top_k)
    return torch.stack([softmax(row[i]) for row, i in zip(logits, ids, strict=True)]), ids


def biased_top_k(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Ids (T, K) of the largest ``scores + bias``."""
    ids = [best((row + bias).tolist(), top_k) for row in scores]
    return torch.tensor(ids, dtype=torch.long).view(-1, top_k)


def noisy_top_k(
    clean: Tensor, size: Tensor, z: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy top-k gating (Shazeer et al. 2017, eq. 3-5 and appendix A).

    Args:
        clean: (T, E), ``x W``.
        size: (T, E), ``softplus(x V)``.
        z: (T, E), standard normal numbers.
        top_k: K < E.

    Returns:
        gates (T, E), weights (T, K), ids (T, K), and P (T, E), the probability that an expert is
        chosen if its own noise is redrawn.
    """
    h = clean + size * z
    weights, ids = softmax_after_selection(h, top_k)
    gates, loads = [], []
    for t in range(h.shape[0]):
        row = [h.new_zeros(())] * h.shape[1]
        for k, e in enumerate(ids[t].tolist()):
            row[e] = weights[t, k]
        gates.append(torch.stack(row))
        p = []
        for e in range(h.shape[1]):
            others = [i for i in range(h.shape[1]) if i != e]
            kth = others[best(h[t, others].tolist(), top_k)[-1]]
            p.append(0.5 * (1 + torch.erf((clean[t, e] - h[t, kth]) / size[t, e] / 2**0.5)))
        loads.append(torch.stack(p))
    return torch.stack(gates), weights, ids, torch.stack(loads)


def gshard(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GShard's weights (T, 2), ids (T, 2), and whether each slot is used, for ``u (T,)``."""
    weights, ids, used = [], [], []
    for row, draw in zip(logits, u.tolist(), strict=True):
        scores = softmax(row)
        i, j = best(scores.tolist(), 2)
        g1, g2 = scores[i] / (scores[i] + scores[j]), scores[j] / (scores[i] + scores[j])
        weights.append(torch.stack([g1, g2]))
        ids.append([i, j])
        used.append([True, 2 * g2.item() > draw])
    return torch.stack(weights), torch.tensor(ids), torch.tensor(used)


def grouped_sigmoid_top_k(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, limit: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's scores (T, E), weights (T, K) and ids (T, K)."""
    size = logits.shape[1] // groups
    all_scores, weights, ids = [], [], []
    for row in logits:
        log_s = torch.nn.functional.logsigmoid(row)  # ratios of s are softmaxes of it
        shifted = (torch.sigmoid(row) + bias).tolist()
        of_group = [
            sum(sorted(shifted[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)
        ]
        open_groups = best(of_group, limit)
        allowed = [v if e // size in open_groups else -math.inf for e, v in enumerate(shifted)]
        chosen = best(allowed, top_k)
        weights.append(scale * softmax(log_s[chosen]))
        ids.append(chosen)
        all_scores.append(softmax(log_s))
    return torch.stack(all_scores), torch.stack(weights), torch.tensor(ids)


def cosine_logits(x: Tensor, projection: Tensor, embedding: Tensor, temperature: Tensor) -> Tensor:
    """``cos(P x, v_e) / tau`` for each token and expert, (T, E)."""
    rows = []
    for token in x:
        p = projection @ token
        rows.append(
            torch.stack(
                [p @ v / (p @ p).sqrt() / (v @ v).sqrt() / temperature.squeeze() for v in embedding]
            )
        )
    return torch.stack(rows)


def expert_choice(scores: Tensor, capacity: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Weights (T, E), zero where a token isn't taken, and all (expert, token) pairs."""
    pairs = []
    weights = torch.zeros_like(scores)
    for e in range(scores.shape[1]):
        for t in best(scores[:, e].tolist(), capacity):
            pairs.append((e, t))
            mask = torch.zeros_like(scores)
            mask[t, e] = 1
            weights = weights + mask * scores
    return weights, pairs


def soft_mixes(x: Tensor, phi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Soft MoE of one sequence ``x (n, D)``: dispatch (S, n) and combine (n, S)."""
    unit_x = torch.stack([row / (row @ row).sqrt() for row in x])
    unit_phi = torch.stack([row / (row @ row).sqrt() for row in phi])
    logits = scale * unit_x @ unit_phi.T
    dispatch = torch.stack([softmax(column) for column in logits.T])
    return dispatch, torch.stack([softmax(row) for row in logits])


def best_assignment(scores: Tensor) -> float:
    """The largest sum of scores of an even assignment, by brute force; T up to about 8."""
    tokens, experts = scores.shape
    places = [e for e in range(experts) for _ in range(tokens // experts + (e < tokens % experts))]
    values: list[list[float]] = scores.tolist()
    return max(
        sum(values[t][e] for t, e in enumerate(order))
        for order in set(itertools.permutations(places))
    )


def sinkhorn_plan(logits: Tensor, iterations: int) -> Tensor:
    """Scales the rows, then the columns, of ``exp(logits)`` to sums of 1 and T/E, repeatedly."""
    tokens, experts = logits.shape
    plan = torch.exp(logits)
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True) * tokens / experts
    return plan


def swipe(logits: list[Tensor], top_k: int, groups: int) -> list[Tensor]:
    """SWIPE's ids, (T_r, K) for each rank's ``logits (T_r, E)``."""
    ids = [[best(row.tolist(), top_k) for row in rank] for rank in logits]
    size = logits[0].shape[1] // groups
    total = sum(len(rank) for rank in ids) * top_k
    room = [math.ceil(total / groups)] * groups
    for k in range(top_k):
        late = []
        for r, rank in enumerate(ids):
            for t, chosen in enumerate(rank):
                group = chosen[k] // size
                if room[group]:
                    room[group] -= 1
                else:
                    late.append((group, r, t))
        for group, r, t in sorted(late):
            while not room[group]:
                group = (group + 1) % groups
            room[group] -= 1
            inside = logits[r][t, group * size : (group + 1) * size].tolist()
            ids[r][t][k] = group * size + best(inside, 1)[0]
    return [torch.tensor(rank, dtype=torch.long).view(-1, top_k) for rank in ids]


def topology_aware(logits: Tensor, near: list[bool], top_k: int, budget: int) -> Tensor:
    """Ids (T, K): ``budget`` tokens may use experts that are not near."""
    free = [best(row.tolist(), top_k) for row in logits]
    wishes = []
    for t, chosen in enumerate(free):
        away = [float(logits[t, e]) for e in chosen if not near[e]]
        if away:
            wishes.append((-max(away), t))
    may_leave = {t for _, t in sorted(wishes)[:budget]}
    stay_home = {t for _, t in wishes} - may_leave
    ids = []
    for t, chosen in enumerate(free):
        if t in stay_home:
            masked = [v if near[e] else -math.inf for e, v in enumerate(logits[t].tolist())]
            chosen = best(masked, top_k)
        ids.append(chosen)
    return torch.tensor(ids).view(-1, top_k)


def capacity_mask(
    ids: Tensor, used: Tensor, capacity: int, num_experts: int, priority: list[float] | None
) -> Tensor:
    """(T, K) bool: the pairs within capacity, first choices first."""
    tokens, top_k = ids.shape
    order = list(range(tokens)) if priority is None else best(priority, tokens)
    room = [capacity] * num_experts
    kept = torch.zeros(tokens, top_k, dtype=torch.bool)
    for k in range(top_k):
        for t in order:
            e = int(ids[t, k])
            if used[t, k] and room[e] > 0:
                room[e] -= 1
                kept[t, k] = True
    return kept


def cv_squared(values: Tensor) -> Tensor:
    """Variance over squared mean."""
    mean = values.sum() / len(values)
    variance = ((values - mean) ** 2).sum() / len(values)
    return variance / mean**2
