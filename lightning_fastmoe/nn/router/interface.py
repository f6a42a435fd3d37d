"""The base classes of routers: ``Router``, and ``LinearRouter`` for those with a weight matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.hooks import watch_hooks
from lightning_fastmoe.nn.router.losses import TOKEN_CHOICE_LOSSES
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext

RouteMethod = TypeVar("RouteMethod", bound=Callable[..., Any])


def any_dtype(route: RouteMethod) -> RouteMethod:
    """Declares that a :meth:`Router.route` takes tokens in any dtype: it computes in fp32 itself.

    All it does with them is :meth:`Router.linear`, which then multiplies them as they are.
    """
    route.takes_any_dtype = True  # type: ignore[attr-defined]
    return route


class Router(nn.Module):
    """Base class of routers. A subclass defines :meth:`route`::

        class Nearest(Router):
            def __init__(self, d_model, num_experts, top_k=2):
                super().__init__(d_model, num_experts, top_k)
                self.centres = nn.Parameter(torch.randn(num_experts, d_model))

            def route(self, x, context):
                logits = -torch.cdist(x, self.centres.to(x.dtype))
                return self.token_choice(logits, torch.softmax(logits, dim=-1))

    Use it as ``MoE(router=Nearest)``, or by its path as ``MoE(router="my.module.Nearest")``.

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K, or None if the router doesn't choose a fixed number.

    Raises:
        ConfigError: if ``top_k`` is outside ``[1, num_experts]``.
    """

    causal: ClassVar[bool] = True
    """Whether a token's experts depend only on that token and earlier ones."""
    random: ClassVar[bool] = False
    """Whether :meth:`route` draws random numbers in training; they come from the context."""
    uses_batch: bool = False
    """Whether :meth:`route` exchanges data with other ranks through the context's batch, other than
    for random numbers; at most K * E counts at a time."""
    losses: ClassVar[frozenset[str]] = TOKEN_CHOICE_LOSSES
    """The losses that apply to this router."""
    default_losses: ClassVar[frozenset[str]] = frozenset({"load_balancing", "z_loss"})
    """The losses that the layer enables by default."""
    capacity_factors: tuple[float | None, float | None] = (None, None)
    """The layer's default capacity factors in training and evaluation."""
    capacity_over: str = "rank"
    """The default of ``MoE(capacity_over=...)``."""
    own_capacity: ClassVar[bool] = False
    """Whether the router itself applies the context's capacity factor."""

    traceable: ClassVar[bool] = False
    """Whether ``torch.compile`` may trace :meth:`route` into its graph, with ``fullgraph=True``."""

    _takes_any_dtype = False
    balance_bias: Tensor | None
    load_since_update: Tensor | None
    tokens_seen: Tensor | None

    def __init__(self, d_model: int, num_experts: int, top_k: int | None) -> None:
        super().__init__()
        watch_hooks(self)
        self.d_model, self.num_experts = d_model, num_experts
        self._takes_any_dtype = self._is_product_alone()
        self._top_k: int | None = None
        if top_k is not None:
            self._top_k = self._in_range(top_k)
        self.register_buffer("balance_bias", None)
        self.register_buffer("load_since_update", None, persistent=False)
        # Numbers the tokens of the whole training run, so that random draws resume with it.
        seen = torch.zeros((), dtype=torch.int64) if self.random else None
        self.register_buffer("tokens_seen", seen)

    @property
    def top_k(self) -> int:
        """Experts per token, K. May be changed between steps."""
        assert self._top_k is not None
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.check_top_k(self._in_range(value))
        self._top_k = value

    def check_top_k(self, top_k: int) -> None:
        """Refuses a K within ``[1, num_experts]`` that this router doesn't support.

        Called whenever :attr:`top_k` is set. A subclass that overrides it calls it at the end of
        its ``__init__``, when the attributes it needs exist.

        Raises:
            ConfigError: if the router doesn't support it.
        """

    def _in_range(self, value: int) -> int:
        valid = isinstance(value, int) and not isinstance(value, bool)
        if not valid or not 1 <= value <= self.num_experts:
            raise ConfigError(
                f"top_k={value!r} is out of range: a token goes to at least 1 and at most"
                f" num_experts={self.num_experts} experts. Choose top_k in [1, {self.num_experts}]."
            )
        return value

    def add_balance_bias(self) -> None:
        """Adds a bias per expert that affects only the selection (DeepSeek-V3).

        Updated by :class:`~lightning_fastmoe.RouterBiasBalancing`. fp32 whatever the model's dtype.
        """
        self.register_buffer("balance_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        # What this rank has routed since the last update of the bias. Not in state dicts: it
        # differs between ranks, and is zero between steps.
        load = torch.zeros(self.num_experts, dtype=torch.int64)
        self.register_buffer("load_since_update", load, persistent=False)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Routes ``x (T, D)`` in fp32, even under autocast; fp64 stays fp64."""
        with torch.autocast(x.device.type, enabled=False):
            if not self._takes_any_dtype:
                x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            return self.route(x, context or RoutingContext(training=self.training))

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes ``x (T, D)``, which is fp32 or fp64 (see :func:`any_dtype`). Autocast is off."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x (T, D) @ weight.T`` in fp32, or in fp64 for an ``x`` in fp64."""
        return ops.router_logits(x, weight)

    def _is_product_alone(self) -> bool:
        """Whether all that :meth:`route` does with tokens is a product by :meth:`linear`."""
        own, plain = type(self), LinearRouter.logits
        return (
            own.linear is Router.linear
            and getattr(own, "logits", plain) is plain
            and getattr(own.route, "takes_any_dtype", False)
        )

    def token_choice(
        self,
        logits: Tensor,
        scores: Tensor,
        *,
        normalize: bool = True,
        log_scores: Tensor | None = None,
    ) -> Routing:
        """Chooses each token's K best experts by score plus the balance bias, if there is one.

        Args:
            logits: (T, E).
            scores: (T, E), a distribution.
            normalize: divide the chosen scores by their sum.
            log_scores: (T, E), the logarithms of the scores up to a constant per token, such as the
                logits of a softmax. If given, normalised weights are computed from them. Otherwise
                a token whose chosen scores all underflow gets equal weights and no gradient.
        """
        expert_ids = self.select(scores, log_scores)
        weights = torch.gather(scores, 1, expert_ids)
        if normalize and log_scores is not None:
            weights = torch.softmax(torch.gather(log_scores, 1, expert_ids), dim=-1)
        elif normalize:
            total = weights.sum(dim=-1, keepdim=True)
            # Below this, gradients, which scale with 1 / total, overflow.
            lost = total < torch.finfo(total.dtype).tiny ** 0.75
            weights = torch.where(lost, 1 / self.top_k, weights / total.masked_fill(lost, 1.0))
        return Routing(logits, scores, weights, expert_ids)

    def select(self, scores: Tensor, tie_break: Tensor | None = None) -> Tensor:
        """Ids of the K largest ``scores (T, E)`` plus bias, largest first, ties to the lower id.

        Args:
            scores: (T, E).
            tie_break: see :func:`~lightning_fastmoe.ops.top_k`.
        """
        chosen = scores.detach()
        if self.balance_bias is not None:
            chosen = chosen + self.balance_bias.to(chosen.dtype)
        return ops.top_k(chosen, self.top_k, None if tie_break is None else tie_break.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keeps the balance bias in fp32 when the model is cast: bf16 can't represent its steps."""
        before = self.balance_bias
        super()._apply(fn, recurse)
        after = self.balance_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.balance_bias = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        k = "" if self._top_k is None else f", top_k={self._top_k}"
        return f"d_model={self.d_model}, num_experts={self.num_experts}{k}"


class LinearRouter(Router):
    """A router whose logits are ``x W^T``, with ``weight`` W of shape (E, D).

    Args:
        d_model: width of a token, D.
        num_experts: E of the whole model.
        top_k: experts per token, K, or None if the router doesn't choose a fixed number.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear``.

    Raises:
        ConfigError: if ``top_k`` is outside ``[1, num_experts]``.
    """

    def __init__(
        self, d_model: int, num_experts: int, top_k: int | None, init_std: float | None = None
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights from torch's global generator."""
        init_gate(self.weight, self.d_model, self.init_std)

    def logits(self, x: Tensor) -> Tensor:
        """``x (T, D) -> (T, E)`` in the dtype of ``x``."""
        return self.linear(x, self.weight)


def unit_vectors(x: Tensor) -> Tensor:
    """``x / |x|`` along the last dimension, for any finite length; zeros stay zeros.

    ``F.normalize`` alone squares unscaled entries: beyond 1e19 a vector becomes zero, and below
    1e-12 it keeps its length.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1.0), dim=-1)


def init_gate(weight: Tensor, d_model: int, init_std: float | None) -> None:
    """Draws a router's weights: as ``nn.Linear`` does, or normal with ``init_std``."""
    if init_std is None:
        nn.init.uniform_(weight, -(d_model**-0.5), d_model**-0.5)
    else:
        nn.init.normal_(weight, 0.0, init_std)
