"""Softmax top-k routing (Shazeer et al. 2017; GShard; Switch Transformer; Mixtral)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import LinearRouter, any_dtype
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


class SoftmaxTopKRouter(LinearRouter):
    """``scores = softmax(x W^T)`` in fp32; the K best experts, weighted by their scores.

    Ties go to the larger logit, then to the lower expert id. The product, the softmax and the
    weights are fp32 whatever the dtype of the tokens, also under autocast.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        normalize_weights: divide the chosen scores by their sum. None means yes for K > 1 and no
            for K = 1, where the only weight would always be 1 and the router would get no gradient.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.
        score_after_selection: weights are the softmax over the K chosen logits alone, as in Mixtral
            and FastMoE's naive gate. Normalised weights, the default for K > 1, are the same
            numbers; this option only refuses settings that differ.
        balance_bias: whether to have a bias per expert that affects only the selection, updated by
            :class:`~lightning_fastmoe.RouterBiasBalancing` (Wang et al. 2024, "Auxiliary-loss-free
            load balancing").

    Raises:
        ConfigError: if ``top_k`` is outside ``[1, num_experts]``, or ``top_k=1`` is combined with
            ``normalize_weights=True`` or ``score_after_selection``.
    """

    traceable: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        normalize_weights: bool | None = None,
        init_std: float | None = None,
        *,
        score_after_selection: bool = False,
        balance_bias: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, init_std)
        self._normalize, self.score_after_selection = normalize_weights, score_after_selection
        if balance_bias:
            self.add_balance_bias()
        self.check_top_k(top_k)

    def check_top_k(self, top_k: int) -> None:
        """Refuses weights that would always be 1."""
        check_normalized(top_k, self._normalize)
        if self.score_after_selection and (top_k == 1 or self._normalize is False):
            raise ConfigError(
                f"score_after_selection=True with top_k={top_k} and normalize_weights="
                f"{self._normalize}: a softmax over the chosen experts is normalised, and over a"
                " single one it is always 1, so the router would get no gradient. Use top_k of at"
                " least 2 and leave normalize_weights alone, or score_after_selection=False."
            )

    @property
    def normalize_weights(self) -> bool:
        """Whether a token's weights sum to 1."""
        return self.top_k > 1 if self._normalize is None else self._normalize

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        logits = self.logits(x)
        bias = None if self.balance_bias is None else self.balance_bias.to(logits.dtype)
        # Normalised weights are computed as a softmax after the selection in any case.
        routed = ops.softmax_top_k(logits, self.top_k, self.normalize_weights, bias)
        return Routing(logits, *routed)

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"{super().extra_repr()}, normalize_weights={self.normalize_weights}"


def check_normalized(top_k: int, normalize_weights: bool | None) -> None:
    """Refuses weights that would always be 1.

    Raises:
        ConfigError: for ``top_k=1`` with ``normalize_weights=True``.
    """
    if top_k == 1 and normalize_weights:
        raise ConfigError(
            "normalize_weights=True with top_k=1 makes every weight exactly 1, so the router"
            " would get no gradient. Use normalize_weights=False (the default for top_k=1)."
        )
