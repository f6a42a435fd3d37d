"""Which experts a call of a layer's experts reads, for those who keep them elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedCall:
    """A call of stacked experts, which may read the parameters of some of them alone.

    Attributes:
        tokens: T; rows where it isn't known which of them belong to a token.
        top_k: experts per token, K; 1 for rows. The mean where it isn't a whole number.
        experts: gives the distinct experts whose parameters it reads, ascending. The host waits for
            the router.
    """

    tokens: int
    top_k: float
    experts: Callable[[], list[int]]
