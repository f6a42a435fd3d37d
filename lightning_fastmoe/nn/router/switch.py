"""Switch Transformer's router (Fedus et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class SwitchRouter(LinearRouter):
    """Only the best expert, weighted by its score; in training the router sees jittered tokens.

    ``scores = softmax((x * u) W^T)`` with ``u (T, D)`` uniform in [1 - jitter, 1 + jitter] in
    training and 1 in evaluation; the expert itself gets x. ``weights (T, 1)`` is the best score.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: 1.
        jitter: half-width of the noise; may be changed between steps, 0 switches it off.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is not 1 or ``jitter`` is outside [0, 1).
    """

    random: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        self.check_top_k(top_k)
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter={jitter!r} is out of range: choose it in [0, 1).")
        self.jitter = jitter

    def check_top_k(self, top_k: int) -> None:
        """Refuses all but 1."""
        if top_k != 1:
            raise ConfigError(
                f"top_k={top_k} doesn't fit Switch routing, which uses one expert per token. Use"
                " top_k=1, or router='softmax'."
            )

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        if context.training and self.jitter > 0:
            x = x * (1 + self.jitter * (2 * context.uniform(x, self.d_model) - 1))
        logits = self.logits(x)
        return Routing(logits, *ops.softmax_top_k(logits, self.top_k, False))
