"""The mixture-of-experts layer: router, dispatcher, experts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe import ops
from lightning_fastmoe.errors import (
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnmanagedExpertsError,
)
from lightning_fastmoe.nn.attached_loss import (
    AttachedLoss,
    AttachedLosses,
    LossScale,
    attach,
    is_recomputing,
)
from lightning_fastmoe.nn.dispatcher import DISPATCHERS, Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.init import draw_layer_seed
from lightning_fastmoe.nn.placement import current_placement
from lightning_fastmoe.nn.router import ROUTERS, Routing, load_balancing_loss, z_loss

RoutingObserver = Callable[["MoE", Routing], None]
"""Called once per forward pass (not when a checkpoint replays it), without gradients."""


class MoE(nn.Module):
    """A sparse mixture-of-experts feed-forward layer. Dropless: no token is ever discarded.

    ``y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])``. On one rank the layer holds all
    experts. :class:`~lightning_fastmoe.FastMoEStrategy` spreads them over the ranks of the expert
    parallel group; the numbers stay the same.

    The load-balancing loss and the z-loss act by themselves: their gradients join the backward pass
    of the layer's output. Under FastMoEStrategy they are scaled exactly as if the terms had been
    added to the loss in ``training_step``; in plain PyTorch as if they had been added to the tensor
    on which ``backward()`` is called. If you divide that by accumulation steps or scale it for fp16
    yourself, add the terms by hand with :func:`moe_losses`; what it returns acts no more by itself.

    Args:
        d_model: width of a token, D.
        d_ffn: inner width of one expert, F.
        num_experts: experts of the whole model, E (not per rank).
        top_k: experts per token, K; a router module of your own has its own.
        activation: "swiglu", "geglu", "reglu" (gated: two up projections), "gelu", "relu", "silu".
        bias: biases in both projections of each expert.
        router: "softmax", or a module called as ``router(x (T, D)) -> Routing``.
        normalize_weights: divide each token's K weights by their sum. None: yes for K > 1.
        load_balancing: coefficient of the load-balancing loss.
        z_loss: coefficient of the router z-loss.
        dispatcher: "auto", "local", or "all_to_all".
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear`` does.

    Raises:
        ConfigError: if an argument is unknown, out of range, or doesn't fit the others.

    Example:
        >>> layer = MoE(d_model=64, d_ffn=128, num_experts=8, top_k=2)
        >>> layer(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router: str | nn.Module = "softmax",
        normalize_weights: bool | None = None,
        load_balancing: float = 0.01,
        z_loss: float = 0.001,
        dispatcher: str = "auto",
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, d_ffn=d_ffn, num_experts=num_experts)
        _check_coefficients(load_balancing=load_balancing, z_loss=z_loss)
        if dispatcher not in DISPATCHERS:
            raise ConfigError(
                f"dispatcher={dispatcher!r} is unknown. It must be one of:"
                f" {', '.join(DISPATCHERS)}."
            )
        self.d_model, self.d_ffn, self.num_experts = d_model, d_ffn, num_experts
        self.loss_coefficients = {"load_balancing": load_balancing, "z_loss": z_loss}
        self.dispatcher_name = dispatcher
        self.layer_name = "MoE"
        layer_seed = draw_layer_seed()
        self.router = _make_router(router, d_model, num_experts, top_k, normalize_weights, init_std)
        placement = None if dispatcher == "local" else current_placement(num_experts)
        self.experts = Experts(
            d_model,
            d_ffn,
            num_experts,
            first_expert=placement.first_expert if placement else 0,
            num_local_experts=placement.num_local_experts if placement else num_experts,
            layer_seed=layer_seed,
            activation=activation,
            bias=bias,
            init_std=init_std,
        )
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)
        # Set by whoever trains spread experts; see `check_managed`.
        self.managed = False
        self.loss_scale = LossScale()
        self.nonfinite_policy: Literal["raise", "collect", "ignore"] = "raise"
        self.nonfinite: Tensor | None = None
        self.last_losses: dict[str, Tensor] = {}
        self._attached = AttachedLosses()
        self._losses_without_graph = False
        self._observers: OrderedDict[int, RoutingObserver] = OrderedDict()
        if placement:
            placement.attach(self)

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, e."""
        return self.experts.num_local_experts

    @property
    def is_spread(self) -> bool:
        """Whether this rank holds only some of the layer's experts."""
        return self.num_local_experts != self.num_experts

    def register_routing_observer(self, observer: RoutingObserver) -> RemovableHandle:
        """Calls ``observer(layer, routing)`` at each forward pass, in training and evaluation."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    # The layer is opaque to torch.compile: its kernels are its own, and the exchange between ranks
    # reads counts on the host. The model around it is compiled as usual.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to each token.

        Args:
            x: (..., d_model) in fp32, bf16 or fp16.

        Returns:
            The same shape and dtype.

        Raises:
            ShapeError: if the last dimension is not ``d_model`` or the dtype is not floating.
            UnmanagedExpertsError: if the experts are spread over ranks and no strategy trains them.
            NonFiniteError: if NaN or Inf reaches the router, on the CPU; on CUDA, where looking
                would stall the device, FastMoEStrategy checks once a step.
        """
        if x.shape[-1:] != (self.d_model,) or not x.is_floating_point():
            raise ShapeError(
                f"{self.layer_name} got an input of shape {tuple(x.shape)} and dtype {x.dtype}; it"
                f" takes (..., {self.d_model}) in a floating dtype. The last dimension must be"
                f" d_model={self.d_model}."
            )
        self._check_managed()
        tokens = x.reshape(-1, self.d_model)
        routing: Routing = self.router(tokens)
        self._check_finite(routing.logits)
        tokens = tokens.to(self._compute_dtype(x))
        if type(self.dispatcher) is LocalDispatcher:
            # Nothing crosses ranks, so one step with one backward does what the three below do.
            order = ops.order_by_expert(routing.expert_ids, self.num_experts)
            y = self.experts(tokens, order.tokens_per_expert, routing.weights, order)
        else:
            rows, counts, handle = self.dispatcher.dispatch(tokens, routing, self.layer_name)
            y = self.dispatcher.combine(self.experts(rows, counts), handle)
        return self._record(y.to(x.dtype), routing).reshape(x.shape)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the GEMMs: autocast's if it is on, else that of the weights."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.experts.up_proj.dtype

    def _record(self, y: Tensor, routing: Routing) -> Tensor:
        """Attaches the losses, notes their values and calls the observers, once per pass."""
        replay = is_recomputing()
        if self.training:
            y = self._attach_losses(y, routing, replay)
        if self._observers and not replay:
            with torch.no_grad():
                for observer in list(self._observers.values()):
                    observer(self, routing)
        return y

    def _attach_losses(self, y: Tensor, routing: Routing, replay: bool) -> Tensor:
        functions = {"load_balancing": load_balancing_loss, "z_loss": z_loss}
        active = {name: c for name, c in self.loss_coefficients.items() if c > 0}
        values = {name: functions[name](routing) for name in active}
        if not replay:
            self.last_losses = {name: value.detach() for name, value in values.items()}
            self._losses_without_graph = bool(values) and not torch.is_grad_enabled()
        terms = {name: active[name] * value for name, value in values.items()}
        if not any(term.requires_grad for term in terms.values()):
            return y
        attached = AttachedLoss(terms, self.loss_scale)
        if not replay:
            self._attached.append(attached)
        return attach(y, attached)

    def _check_finite(self, logits: Tensor) -> None:
        if self.nonfinite_policy == "ignore":
            return
        # Any NaN or Inf makes this sum non-finite; one scalar per pass, no host sync by itself.
        bad = ~torch.isfinite(logits.detach()).all()
        if self.nonfinite_policy == "collect":
            if self.training:
                self.nonfinite = bad if self.nonfinite is None else self.nonfinite | bad
        elif logits.device.type == "cpu" and bool(bad):
            # On CUDA reading the flag would stall the stream; there the strategy collects it.
            raise NonFiniteError(
                f"{self.layer_name}: the router's logits hold NaN or Inf, so its input does, or its"
                " weights do. Lower the learning rate or look for the bad batch; set the layer's"
                " nonfinite_policy='ignore' to let it pass."
            )

    def _check_managed(self) -> None:
        if self.dispatcher_name == "all_to_all" and isinstance(self.dispatcher, LocalDispatcher):
            raise UnmanagedExpertsError(
                f"{self.layer_name}: dispatcher='all_to_all' exchanges tokens between ranks, but no"
                " expert parallel group was set up. Train with FastMoEStrategy, or use"
                " dispatcher='auto'."
            )
        if self.is_spread and not self.managed:
            raise UnmanagedExpertsError(
                f"{self.layer_name} holds {self.num_local_experts} of {self.num_experts} experts,"
                " but the strategy that runs it knows nothing of experts: their gradients would be"
                " wrong and other experts unreachable. Use FastMoEStrategy, or build the model anew"
                " to train all experts on each rank."
            )

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"num_experts={self.num_experts}, dispatcher={self.dispatcher_name}"


def moe_layers(module: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The MoE layers inside ``module``, with their names, in registration order."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, MoE))


def moe_losses(module: nn.Module) -> dict[str, Tensor]:
    """The balancing terms of the latest forward passes, for those who add them by hand.

    Whatever this returns acts no more by itself, so nothing is counted twice::

        loss = cross_entropy + sum(moe_losses(self).values())

    Args:
        module: any module that contains MoE layers.

    Returns:
        ``{"load_balancing": ..., "z_loss": ...}``: coefficient times term, summed over all layers
        and all forward passes since the last call whose graphs are alive. Empty if there is none.

    Raises:
        ConfigError: after a forward pass inside a re-entrant activation checkpoint, whose terms
            have no graph yet.
    """
    totals: dict[str, Tensor] = {}
    for name, layer in moe_layers(module):
        if layer._losses_without_graph:
            raise ConfigError(
                f"moe_losses: the last training pass of layer {name!r} ran without gradients, as"
                " re-entrant activation checkpointing does, so its terms can't be added by hand."
                " Leave them to act by themselves, or use checkpoint(..., use_reentrant=False)."
            )
        for attached in layer._attached.take():
            for key, term in attached.terms.items():
                totals[key] = totals[key] + term if key in totals else term
    return totals


def _make_router(
    router: str | nn.Module,
    d_model: int,
    num_experts: int,
    top_k: int,
    normalize_weights: bool | None,
    init_std: float | None,
) -> nn.Module:
    if isinstance(router, nn.Module):
        if getattr(router, "num_experts", num_experts) != num_experts:
            raise ConfigError(
                f"The router chooses among {router.num_experts} experts, but the layer has"
                f" num_experts={num_experts}. Give both the same number."
            )
        if normalize_weights is not None:
            raise ConfigError(
                "normalize_weights is an option of the built-in routers, but router= is a module of"
                " its own. Drop the argument; the module decides."
            )
        return router
    if router not in ROUTERS:
        raise ConfigError(
            f"router={router!r} is unknown. It must be a module or one of: {', '.join(ROUTERS)}."
        )
    return ROUTERS[router](d_model, num_experts, top_k, normalize_weights, init_std)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} is invalid: it must be an integer of at least 1.")


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"{name}={value!r} is invalid: a loss coefficient must be finite and at least 0"
                " (0 switches the loss off)."
            )


__all__ = ["MoE", "moe_layers", "moe_losses"]
