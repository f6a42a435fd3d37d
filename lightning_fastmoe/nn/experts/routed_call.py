"""Which experts a call of a layer's experts reads, for those who keep them elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutedCall:
    """A call of stacked experts, which reads the parameters of some of them alone.

    Attributes:
        tokens: T; rows where it isn't known which of them belong to a token.
        top_k: experts per token, K; 1 for rows.
        used: gives (E,) bool on the device of the call: which experts it reads.
    """

    tokens: int
    top_k: int
    used: Callable[[], Tensor]

    def experts(self) -> list[int]:
        """The experts that it reads, ascending. The host waits for the router."""
        return [e for e, is_used in enumerate(self.used().tolist()) if is_used]
