"""Noisy top-k gating (Shazeer et al. 2017, "Outrageously large neural networks", section 2.1)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router.interface import Router, any_dtype, init_gate
from lightning_fastmoe.nn.router.losses import TOKEN_CHOICE_LOSSES
from lightning_fastmoe.nn.router.random import normal_from_uniform
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext

_SMALLEST_NOISE = 1e-26
"""Lower limit of the noise's standard deviation; softplus alone can underflow to zero. Smaller
noise would only break ties, while the load and its gradient, which scale with 1 / size, would
overflow fp32."""


class NoisyTopKRouter(Router):
    """Top-k of noisy logits; the router learns the size of the noise, CV^2 losses balance the load.

    With ``c = x W^T``, ``s = softplus(x V^T)`` and standard normal noise z (none in evaluation)::

        h = c + noise * s * z                    (T, E)
        weights = softmax over the K largest h   (T, K)
        load[t, e] = Phi((c[t, e] - kth[t, e]) / (noise * s[t, e]))

    where ``noise * s`` is at least 1e-26.

    ``kth[t, e]`` is the K-th largest of h[t] with e left out, so ``load`` is the probability that e
    is chosen if only its own noise is redrawn: a differentiable substitute for the counts. The
    losses of the paper are ``importance`` (CV^2 of the summed gates) and ``load`` (CV^2 of the
    summed load), each with coefficient 0.1 there.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K; at least 2, as for K = 1 the only weight is always 1.
        noise: factor on the noise; may be changed between steps, 0 switches it off.
        init_std: standard deviation of W; None initialises with zeros, as the paper does, so that
            at first only the noise decides.

    Raises:
        ConfigError: if ``top_k`` is out of range or ``noise`` negative.
    """

    random: ClassVar[bool] = True
    losses: ClassVar[frozenset[str]] = TOKEN_CHOICE_LOSSES | {"load"}
    default_losses: ClassVar[frozenset[str]] = frozenset({"importance", "load"})

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        noise: float = 1.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.check_top_k(top_k)
        check_at_least(noise=(noise, 0))
        self.noise, self.init_std = noise, init_std
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, d_model))
        if init_std is not None:
            init_gate(self.weight, d_model, init_std)

    def check_top_k(self, top_k: int) -> None:
        """Refuses a K whose only weight would always be 1."""
        check_at_least(top_k=(top_k, min(2, self.num_experts)))

    @any_dtype
    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """See :class:`~lightning_fastmoe.nn.router.interface.Router`."""
        clean = self.linear(x, self.weight)
        noisy, load = clean, None
        if context.training and self.noise > 0:
            z = normal_from_uniform(context.uniform(clean, self.num_experts))
            size = self.noise * F.softplus(self.linear(x, self.noise_weight))
            size = size.clamp_min(_SMALLEST_NOISE)
            noisy = clean + size * z.to(clean.dtype)
            load = self._load(clean, noisy, size)
        expert_ids = ops.top_k(noisy.detach(), self.top_k)
        weights = torch.softmax(torch.gather(noisy, 1, expert_ids), dim=-1)
        scores = torch.zeros_like(noisy).scatter(1, expert_ids, weights)
        return Routing(noisy, scores, weights, expert_ids, load=load)

    def _load(self, clean: Tensor, noisy: Tensor, size: Tensor) -> Tensor:
        k = self.top_k
        if k == self.num_experts:
            return torch.ones_like(clean)  # every expert is chosen, whatever the noise
        order = ops.top_k(noisy.detach(), k + 1)
        best = torch.gather(noisy, 1, order)
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, order[:, :k], True)
        # Leaving out a chosen expert, the K-th largest of the others is the (K+1)-th of all.
        kth = torch.where(chosen, best[:, k : k + 1], best[:, k - 1 : k])
        # A product, because the gradient of a quotient contains size^2, which underflows.
        probability: Tensor = torch.special.ndtr((clean - kth) * torch.exp(-torch.log(size)))
        return probability


def check_at_least(**values: tuple[float, float]) -> None:
    """Refuses values below their limits.

    Raises:
        ConfigError: for ``name=(value, limit)`` with ``value < limit``, or a value that is NaN.
    """
    for name, (value, limit) in values.items():
        if not value >= limit:
            raise ConfigError(f"{name}={value!r} is invalid: it must be at least {limit}.")
