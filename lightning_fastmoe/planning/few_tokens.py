"""How many experts of a layer a few tokens need: whether the others are worth copying."""

from __future__ import annotations

_SHARE = 0.7
"""Of a layer's experts, from which on all are copied: ahead, in one piece, without a wait for the
router."""


def expected_experts(num_experts: int, top_k: float, tokens: int) -> float:
    """Distinct experts that tokens choose if each chooses evenly: ``E (1 - (1 - K/E)^T)``.

    Args:
        num_experts: E.
        top_k: experts per token, K.
        tokens: T.
    """
    return float(num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens))


def are_few(num_experts: int, top_k: float, tokens: int) -> bool:
    """Whether so few experts are expected that only those are copied that were chosen.

    Args:
        num_experts: E.
        top_k: experts per token, K.
        tokens: T.
    """
    return expected_experts(num_experts, top_k, tokens) < _SHARE * num_experts
