"""Cosine routing (X-MoE, Chi et al. 2022; Swin-MoE in Tutel, Hwang et al. 2022)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import Router, init_gate, unit_vectors
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext
from lightning_fastmoe.nn.router.softmax import check_normalized

_LOWEST_TEMPERATURE = 0.01


class CosineTopKRouter(Router):
    """Softmax top-k of the cosine between a projected token and each expert's embedding.

    ``logits[t, e] = cos(P x[t], v[e]) / tau``: on a low-dimensional sphere tokens don't cluster
    around the experts' embeddings, which would make representations collapse (X-MoE). tau is
    learned as ``exp(-log_scale)`` and never below 0.01 (Swin-MoE), or fixed.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K.
        d_router: dimension of the sphere's space; None is E/2 as in X-MoE, at least 2. Swin-MoE
            uses 256.
        temperature: the initial tau.
        learn_temperature: whether tau is learned, as in Swin-MoE; False keeps it fixed.
        normalize_weights: divide the chosen scores by their sum. None: yes for K > 1.
        init_std: standard deviation of the initial projection; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if a size or the temperature is out of range.
    """

    traceable: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        d_router: int | None = None,
        temperature: float = 0.5,
        learn_temperature: bool = True,
        normalize_weights: bool | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        width = max(2, num_experts // 2) if d_router is None else d_router
        if width < 1:
            raise ConfigError(f"d_router={d_router!r} is invalid: it must be at least 1.")
        if not temperature >= _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature={temperature!r} is invalid: it must be at least"
                f" {_LOWEST_TEMPERATURE}."
            )
        self._normalize, self.init_std, self.temperature = normalize_weights, init_std, temperature
        self.projection = nn.Parameter(torch.empty(width, d_model))
        self.embedding = nn.Parameter(torch.empty(num_experts, width))
        # Shape (1,), not (): ZeRO 3 can't partition a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.empty(1), requires_grad=learn_temperature)
        self.check_top_k(top_k)
        self.reset_parameters()

    def check_top_k(self, top_k: int) -> None:
        """Refuses weights that would always be 1."""
        check_normalized(top_k, self._normalize)

    def reset_parameters(self) -> None:
        """Draws new weights from torch's global generator."""
        init_gate(self.projection, self.d_model, self.init_std)
        nn.init.normal_(self.embedding)  # directions are all that counts
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        projected = unit_vectors(self.linear(x, self.projection))
        cosine = projected @ unit_vectors(self.embedding.to(x.dtype)).T
        scale = self.log_scale.to(x.dtype).clamp(max=-math.log(_LOWEST_TEMPERATURE)).exp()
        logits = cosine * scale
        normalize = self.top_k > 1 if self._normalize is None else self._normalize
        return Routing(logits, *ops.softmax_top_k(logits, self.top_k, normalize))
