"""Softmax top-k routing (Shazeer et al. 2017; GShard; Switch Transformer; Mixtral)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.base import Routing


class SoftmaxTopKRouter(nn.Module):
    """``scores = softmax(x W^T)`` in fp32; the K best experts, weighted by their scores.

    Ties go to the lower expert id. The product, the softmax and the weights are fp32 whatever the
    dtype of the tokens, also under autocast.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        normalize_weights: divide the chosen scores by their sum. None means yes for K > 1 and no
            for K = 1, where the only weight would always be 1 and the router would get no gradient.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is outside ``[1, num_experts]``, or ``top_k=1`` is combined with
            ``normalize_weights=True``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        normalize_weights: bool | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"top_k={top_k!r} is out of range: a token goes to at least 1 and at most"
                f" num_experts={num_experts} experts. Choose top_k in [1, {num_experts}]."
            )
        if top_k == 1 and normalize_weights:
            raise ConfigError(
                "normalize_weights=True with top_k=1 makes every weight exactly 1, so the router"
                " would get no gradient. Use normalize_weights=False (the default for top_k=1)."
            )
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.normalize_weights = top_k > 1 if normalize_weights is None else normalize_weights
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights from torch's global generator."""
        if self.init_std is None:
            nn.init.uniform_(self.weight, -(self.d_model**-0.5), self.d_model**-0.5)
        else:
            nn.init.normal_(self.weight, 0.0, self.init_std)

    def forward(self, x: Tensor) -> Routing:
        """Routes ``x (T, D)``."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            scores, weights, expert_ids = ops.softmax_top_k(
                logits, self.top_k, self.normalize_weights
            )
        return Routing(logits, scores, weights, expert_ids)

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k},"
            f" normalize_weights={self.normalize_weights}"
        )
