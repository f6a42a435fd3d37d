"""The mixture-of-experts layer: router, dispatcher, experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.argument_types import check_types
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.attached_loss import AttachedLosses, LossScale, is_recomputing
from lightning_fastmoe.nn.capacity import (
    CapacityFactors,
    CapacityOver,
    DropBy,
    limit_by_capacity,
)
from lightning_fastmoe.nn.dispatcher import DISPATCHERS, Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.expert_pass import run_modules, run_stacked
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.global_batch import GlobalBatch, LocalBatch
from lightning_fastmoe.nn.init import draw_layer_seed
from lightning_fastmoe.nn.layer_checks import check_finite, check_managed, check_routing
from lightning_fastmoe.nn.layer_losses import attach_losses
from lightning_fastmoe.nn.layer_settings import LayerSettings
from lightning_fastmoe.nn.module_experts import ExpertFactory
from lightning_fastmoe.nn.moe_options import (
    DEFAULT_COEFFICIENTS,
    RouterArgument,
    capacity_factors,
    check_sizes,
    loss_coefficients,
    make_experts,
    make_router,
    warn_if_not_causal,
)
from lightning_fastmoe.nn.placement import current_placement
from lightning_fastmoe.nn.random import PassNumbers
from lightning_fastmoe.nn.router import ROUTERS, Router, Routing, RoutingContext
from lightning_fastmoe.nn.shared_expert import SharedExpert
from lightning_fastmoe.nn.token_inputs import MaskedValues, TokenInputs, read_inputs

_CHECKED = (
    *("d_model", "d_ffn", "num_experts", "top_k", "activation", "bias", "normalize_weights"),
    *("router_options", "shared_expert", "shared_expert_gate", "dispatcher", "init_std"),
    *("autoregressive", *DEFAULT_COEFFICIENTS),
)
"""The arguments whose types are checked at once; the others are looked at where they are used."""

RoutingObserver = Callable[["MoE", Routing], None]
"""Called once per forward pass (not when a checkpoint replays it), without gradients."""


class MoE(LayerSettings):
    """A sparse mixture-of-experts feed-forward layer. Dropless unless it is given a capacity.

    ``y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])``. On one rank the layer holds all
    experts. :class:`~lightning_fastmoe.FastMoEStrategy` spreads them over the ranks of the expert
    parallel group; the numbers stay the same.

    The losses act by themselves: their gradients join the backward pass
    of the layer's output. Under FastMoEStrategy they are scaled exactly as if the terms had been
    added to the loss in ``training_step``; in plain PyTorch as if they had been added to the tensor
    on which ``backward()`` is called. If you divide that by accumulation steps or scale it for fp16
    yourself, add the terms by hand with :func:`~lightning_fastmoe.moe_losses`; what it returns acts
    no more by itself.

    ``top_k``, ``capacity_factor``, ``eval_capacity_factor``, ``loss_coefficients`` and the router's
    noise can be set between steps, alike on all ranks; nothing is built anew.

    Args:
        d_model: width of a token, D.
        d_ffn: inner width of one expert, F; with ``expert=`` an argument for it, or None.
        num_experts: experts of the whole model, E (not per rank). None counts the list of experts.
        top_k: experts per token, K; None leaves it to the router.
        activation: "swiglu", "geglu", "reglu", "clamped_swiglu" (gated: two up projections),
            "gelu", "relu", "silu".
        bias: biases in both projections of each expert.
        router: a name of :data:`~lightning_fastmoe.nn.router.ROUTERS`; the path of a class; a class
            or function called as ``router(d_model, num_experts, ...)``; or a module, called as
            ``router(x (T, D)) -> Routing``, or as ``router(x, context)`` if it derives from
            :class:`~lightning_fastmoe.nn.Router`.
        router_options: further arguments for a router that is built here.
        normalize_weights: divide each token's K weights by their sum. None: yes for K > 1.
        load_balancing: coefficient of the load-balancing loss. For this and the other losses None
            means: as usual for this router.
        z_loss: coefficient of the router z-loss.
        importance: coefficient of the CV^2 of the experts' summed scores.
        load: coefficient of the CV^2 of the experts' smooth loads (noisy routers).
        sequence_balancing: coefficient of the load-balancing loss of each sequence by itself.
        global_balancing: coefficient of the load-balancing loss over all ranks' tokens.
        capacity_factor: an expert takes at most ``ceil(factor * K * T / E)`` pairs, others are
            dropped: they contribute zero. A number, a pair (training, evaluation), None for
            dropless, or "router" for the router's own.
        capacity_over: T is the tokens of this "rank", or of the "global" batch.
        drop_by: who keeps their place: earlier tokens ("position") or those with the best scores
            ("score").
        expert: instead of FFNs: a module class or a function, called per expert as
            ``expert(d_model, d_ffn)`` or ``expert(d_model)``, or the path of one; or a list of E
            modules.
        shared_expert: inner width of a dense FFN added for every token, or a module.
        shared_expert_gate: multiply its output by a learned ``sigmoid(w x)``.
        dispatcher: "auto", "local", or "all_to_all".
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear`` does.
        autoregressive: warn if the router looks at later tokens.

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
        d_ffn: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router: RouterArgument = "softmax",
        router_options: Mapping[str, Any] | None = None,
        normalize_weights: bool | None = None,
        load_balancing: float | None = None,
        z_loss: float | None = None,
        importance: float | None = None,
        load: float | None = None,
        sequence_balancing: float | None = None,
        global_balancing: float | None = None,
        capacity_factor: CapacityFactors | str = "router",
        capacity_over: CapacityOver | None = None,
        drop_by: DropBy = "position",
        expert: ExpertFactory | Sequence[nn.Module] | str | None = None,
        shared_expert: int | nn.Module | None = None,
        shared_expert_gate: bool = False,
        dispatcher: str = "auto",
        init_std: float | None = None,
        autoregressive: bool = False,
    ) -> None:
        values = {name: value for name, value in locals().items() if name in _CHECKED}
        super().__init__()
        values = check_types("MoE", MoE.__init__, values)
        d_model, d_ffn, num_experts, top_k = (values[name] for name in _CHECKED[:4])
        shared_expert = values["shared_expert"]
        if (
            num_experts is None
            and not isinstance(expert, str)
            and isinstance(expert, Sequence | nn.ModuleList)
        ):
            num_experts = len(expert)
        check_sizes(d_model=d_model, num_experts=num_experts)
        if d_ffn is not None or expert is None:
            check_sizes(d_ffn=d_ffn)
        assert num_experts is not None
        if dispatcher not in DISPATCHERS:
            raise ConfigError(
                f"dispatcher={dispatcher!r} is unknown. It must be one of:"
                f" {', '.join(DISPATCHERS)}."
            )
        self.d_model, self.d_ffn, self.num_experts = d_model, d_ffn, num_experts
        self.dispatcher_name = dispatcher
        self.layer_name = "MoE"
        self._seed = draw_layer_seed()
        self.router = make_router(
            router, router_options, d_model, num_experts, top_k, normalize_weights, init_std
        )
        losses = {name: values[name] for name in DEFAULT_COEFFICIENTS}
        self.loss_coefficients = loss_coefficients(self.router, **losses)
        self._capacity_factors = capacity_factors(self.router, capacity_factor)
        usual: CapacityOver = getattr(self.router, "capacity_over", "rank")
        self.capacity_over = usual if capacity_over is None else capacity_over
        self.drop_by = drop_by
        placement = None if dispatcher == "local" else current_placement(num_experts)
        make = partial(
            make_experts,
            expert,
            d_model,
            d_ffn,
            num_experts,
            layer_seed=self._seed,
            activation=activation,
            bias=bias,
            init_std=init_std,
        )
        self.experts = make(placement)
        self.shared_expert: SharedExpert | None = None
        if shared_expert is not None:
            if not isinstance(shared_expert, nn.Module):
                check_sizes(shared_expert=shared_expert)
            self.shared_expert = SharedExpert(
                d_model,
                shared_expert,
                activation=activation,
                bias=bias,
                gate=shared_expert_gate,
                init_std=init_std,
            )
        elif shared_expert_gate:
            raise ConfigError(
                "shared_expert_gate=True without shared_expert: there is none to gate."
            )
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)
        self.batch: GlobalBatch = LocalBatch()
        # Set by whoever trains spread experts; see `layer_checks.check_managed`.
        self.managed = False
        self.loss_scale = LossScale()
        self.nonfinite_policy: Literal["raise", "collect", "ignore"] = "raise"
        self.nonfinite: Tensor | None = None
        self.last_losses: dict[str, Tensor] = {}
        self._attached = AttachedLosses()
        self._losses_without_graph = False
        self._observers: OrderedDict[int, RoutingObserver] = OrderedDict()
        self._passes = PassNumbers()
        if autoregressive:
            warn_if_not_causal(self, self.layer_name)
        if placement:
            placement.attach(self)
            if placement.remember:
                placement.remember(self, make)

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
    def forward(
        self,
        x: Any,
        *,
        mask: Tensor | None = None,
        masked_values: MaskedValues | None = None,
        token_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Any:
        """Applies the layer to each token.

        Args:
            x: (..., d_model) in fp32, bf16 or fp16. With ``expert=`` also a tuple, list or dict of
                tensors (T, ...), the first of them (T, d_model), by which the router chooses; the
                experts get their rows of all.
            mask: (...), False or 0 for the tokens that take part. The others skip router, experts,
                losses and counts. Reads their number from the device.
            masked_values: what masked tokens return: a number, a tensor (d_model,), or for an
                integer mask a value for each label. None is zero.
            token_ids: (...), vocabulary ids, for hash routing.
            sequence_ids: (...), integers, where rows hold several sequences (packed documents):
                neighbours in a row with the same number belong together. Only
                ``sequence_balancing`` looks at it. None: each row of the first dimension is one.

        Returns:
            The same shape and dtype; what the experts return, if they are modules.

        Raises:
            ShapeError: if the last dimension is not ``d_model`` or the dtype is not floating; if a
                mask or ids have another shape than the tokens, or a floating dtype.
            ConfigError: if the router looks at whole sequences, and ``mask`` or ``sequence_ids``
                leave none.
            UnmanagedExpertsError: if the experts are spread over ranks and no strategy trains them.
            NonFiniteError: if NaN or Inf reaches the router, on the CPU; on CUDA, where looking
                would stall the device, FastMoEStrategy checks once a step.
        """
        options = {"mask": mask, "token_ids": token_ids, "sequence_ids": sequence_ids}
        inputs = read_inputs(x, self.d_model, self.layer_name, **options)
        check_managed(self)
        context = self._context(inputs)
        routing = self._route(inputs.leaves[0], context)
        y, routing = self._run(inputs, routing)
        y = self._record(y, routing, context)
        return pytree.tree_map(lambda leaf: inputs.restore(leaf, masked_values), y)

    def _context(self, inputs: TokenInputs) -> RoutingContext:
        """What the router may ask for in this pass."""
        context = RoutingContext(
            training=self.training,
            grid=inputs.grid,
            positions=inputs.positions,
            sequence_ids=inputs.sequence_ids,
            token_ids=inputs.token_ids,
            capacity_factor=self._capacity_factors[0 if self.training else 1],
            seed=self._seed,
            batch=self.batch,
            layer=self.layer_name,
        )
        seen = getattr(self.router, "tokens_seen", None)
        if self.training and seen is not None:
            tokens = inputs.leaves[0].shape[0]
            context.first_token = self._passes.first_token(
                seen, tokens, self.batch, self.layer_name, replay=is_recomputing()
            )
        return context

    def _route(self, tokens: Tensor, context: RoutingContext) -> Routing:
        """The router's choice, after the capacity's."""
        routing: Routing
        if isinstance(self.router, Router):
            routing = self.router(tokens, context)
        else:
            routing = self.router(tokens)
        if type(self.router) not in ROUTERS.values():
            check_routing(self, routing, tokens.shape[0])
        check_finite(self, routing.logits)
        factor = context.capacity_factor
        if factor is None or getattr(self.router, "own_capacity", False):
            return routing
        if routing.token_ids is not None or routing.dispatch_mix is not None:
            raise ConfigError(
                f"{self.layer_name}: capacity_factor={factor} limits token choice, but"
                f" {type(self.router).__name__} does not choose K experts per token. Drop it, or"
                " set own_capacity = True in the router's class and act on the context's factor."
            )
        return limit_by_capacity(
            routing,
            factor,
            over=self.capacity_over,
            by=self.drop_by,
            batch=self.batch,
            layer=self.layer_name,
        )

    def _run(self, inputs: TokenInputs, routing: Routing) -> tuple[Any, Routing]:
        """Routed and shared experts."""
        x = inputs.leaves[0]
        dtype = self._compute_dtype(x)
        leaves = [t.to(dtype) if t.is_floating_point() else t for t in inputs.leaves]
        if isinstance(self.experts, Experts):
            if inputs.spec is not None:
                raise ConfigError(
                    f"{self.layer_name} got a structure of tensors, but its experts are FFNs. Use"
                    " MoE(expert=...) with modules that take it."
                )
            y, routing = run_stacked(
                leaves[0], routing, self.experts, self.dispatcher, self.layer_name
            )
        else:
            y, routing = run_modules(
                leaves, inputs.spec, routing, self.experts, self.dispatcher, self.layer_name
            )
        if self.shared_expert is not None:
            if not isinstance(y, Tensor):
                raise ConfigError(
                    f"{self.layer_name}: shared_expert adds to one tensor, but the experts return a"
                    " structure. Drop it."
                )
            y = y + self.shared_expert(leaves[0])
        if isinstance(y, Tensor) and inputs.spec is None:
            y = y.to(x.dtype)
        return y, routing

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the GEMMs: autocast's if it is on, else that of the weights."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.experts.dtype or x.dtype

    def _record(self, y: Any, routing: Routing, context: RoutingContext) -> Any:
        """Attaches the losses, notes their values and calls the observers, once per pass."""
        replay = is_recomputing()
        if self.training:
            y = attach_losses(self, y, routing, context, replay=replay)
            router = self.router
            if not replay and isinstance(router, Router) and router.load_since_update is not None:
                router.load_since_update += routing.routed_counts()
        if self._observers and not replay:
            with torch.no_grad():
                for observer in list(self._observers.values()):
                    observer(self, routing)
        return y

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"num_experts={self.num_experts}, dispatcher={self.dispatcher_name}"
