"""The mixture-of-experts layer: a router chooses experts, a schedule runs tokens through them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.argument_types import check_types
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import traced
from lightning_fastmoe.nn.attached_loss import is_recomputing
from lightning_fastmoe.nn.balancing import BalancingLosses
from lightning_fastmoe.nn.capacity import Capacity, CapacityFactors, CapacityOver, DropBy
from lightning_fastmoe.nn.dispatch import ONE_RANK, check_dispatcher
from lightning_fastmoe.nn.experts import ExpertFactory, Experts, draw_layer_seed
from lightning_fastmoe.nn.global_batch import RESERVED_TOP_K, GlobalBatch, LocalBatch
from lightning_fastmoe.nn.hooks import watch_hooks
from lightning_fastmoe.nn.inputs import MaskedValues, TokenInputs, read_inputs
from lightning_fastmoe.nn.nonfinite import NonFiniteGuard
from lightning_fastmoe.nn.observers import RoutingObserver, add_observer, show_observers
from lightning_fastmoe.nn.opaque import Reference
from lightning_fastmoe.nn.options import (
    RouterArgument,
    check_sizes,
    make_experts,
    make_router,
    make_shared_expert,
    resolve_num_experts,
    warn_if_not_causal,
)
from lightning_fastmoe.nn.parts import part_of
from lightning_fastmoe.nn.placement import current_placement
from lightning_fastmoe.nn.router import Router, Routing, RoutingContext
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.nn.router.random import PassNumbers
from lightning_fastmoe.nn.router.traits import RouterTraits, route
from lightning_fastmoe.nn.schedule import LocalSchedule, Schedule, UnmanagedSchedule

_CHECKED = (
    *("d_model", "d_ffn", "num_experts", "top_k", "activation", "bias", "normalize_weights"),
    *("router_options", "shared_expert", "shared_expert_gate", "dispatcher", "exact", "init_std"),
    *("autoregressive", *LOSSES),
)
"""Arguments whose types are checked up front; the others are checked where they are used."""


class MoE(nn.Module):
    """A sparse mixture-of-experts feed-forward layer. Dropless unless given a capacity.

    ``y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])``. On one rank the layer holds all
    experts. :class:`~lightning_fastmoe.FastMoEStrategy` shards them over the ranks of the expert
    parallel group; the numbers stay the same.

    A forward pass, with tokens T, width D, experts E and K = top_k:

    1. read: the input becomes ``x (T, D)``, without masked tokens;
    2. route: the router gives each token K experts and their weights, ``(T, K)``;
    3. limit: with a capacity, pairs that exceed it are dropped;
    4. run: the schedule sends rows to their experts, on any rank, and sums the weighted outputs;
    5. attach: the losses join the backward pass;
    6. restore: the output gets the input's shape and dtype.

    The losses take effect automatically: their gradients join the backward pass of the output.
    Under FastMoEStrategy they are scaled exactly as if the terms had been added to the loss in
    ``training_step``; in plain PyTorch as if they had been added to the tensor on which
    ``backward()`` is called. If you divide that by accumulation steps or scale it for fp16
    yourself, add the terms by hand with :func:`~lightning_fastmoe.moe_losses`; the terms that it
    returns are no longer added automatically.

    ``top_k``, ``capacity_factor``, ``eval_capacity_factor``, ``loss_coefficients`` and the router's
    noise may be changed between steps, identically on all ranks; nothing is rebuilt.

    Args:
        d_model: width of a token, D.
        d_ffn: inner width of one expert, F; with ``expert=`` an argument for it, or None.
        num_experts: experts in the whole model, E, not per rank; None counts a list ``expert=[]``.
        top_k: experts per token, K. None: the router's default.
        activation: "swiglu", "geglu", "reglu", "clamped_swiglu" (gated: two up projections),
            "gelu", "relu", "silu".
        bias: whether both projections of each expert have biases.
        router: a name of :data:`~lightning_fastmoe.nn.router.ROUTERS`; the path of a class; a class
            or function called as ``router(d_model, num_experts, ...)``; or a module, called as
            ``router(x (T, D)) -> Routing``, or as ``router(x, context)`` if it derives from
            :class:`~lightning_fastmoe.nn.Router`.
        router_options: further arguments for a router that this layer builds.
        normalize_weights: divide each token's K weights by their sum. None: yes for K > 1.
        load_balancing: coefficient of the load-balancing loss. For this and the other losses, None
            is the router's default.
        z_loss: coefficient of the router z-loss.
        importance: coefficient of the CV^2 of the experts' summed scores.
        load: coefficient of the CV^2 of the experts' smooth loads (noisy routers).
        sequence_balancing: coefficient of the load-balancing loss computed per sequence.
        global_balancing: coefficient of the load-balancing loss over all ranks' tokens.
        capacity_factor: an expert takes at most ``ceil(factor * K * T / E)`` (token, slot) pairs;
            the others are dropped and contribute zero. A number, a pair (training, evaluation),
            None for dropless, or "router" for the router's default.
        capacity_over: whether T counts the tokens of this "rank" or of the "global" batch.
        drop_by: which tokens an expert keeps when it is full: the earlier ones ("position") or
            those with the best scores ("score").
        expert: replaces the FFNs: a module class or a function, called once per expert as
            ``expert(d_model, d_ffn)`` or ``expert(d_model)``, or the path of one; or a list of E
            modules.
        shared_expert: inner width of a dense FFN added for every token, or a module.
        shared_expert_gate: multiply the shared expert's output by a learned ``sigmoid(w x)``.
        dispatcher: how tokens reach sharded experts: "auto", or another name of
            :data:`~lightning_fastmoe.nn.dispatch.DISPATCHERS`; "local" doesn't shard the experts.
        exact: whether outputs and tokens' gradients must have the bits of one process; more rows
            come back from the experts then. For :data:`~lightning_fastmoe.nn.dispatch.EXACT`.
        init_std: standard deviation of the initial weights; None initialises as ``nn.Linear`` does.
        autoregressive: warn if the router looks at later tokens.

    Attributes:
        is_traced: set by :func:`~lightning_fastmoe.nn.trace_layers`.

    Raises:
        ConfigError: if an argument is unknown, out of range, or inconsistent with the others.

    Example:
        >>> layer = MoE(d_model=64, d_ffn=128, num_experts=8, top_k=2)
        >>> layer(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    is_traced = False

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
        exact: bool = False,
        init_std: float | None = None,
        autoregressive: bool = False,
    ) -> None:
        values = {name: value for name, value in locals().items() if name in _CHECKED}
        super().__init__()
        watch_hooks(self)
        values = check_types("MoE", MoE.__init__, values)
        d_model, d_ffn, num_experts, top_k = (values[name] for name in _CHECKED[:4])
        num_experts = resolve_num_experts(num_experts, expert)
        check_sizes(d_model=d_model)
        if d_ffn is not None or expert is None:
            check_sizes(d_ffn=d_ffn)
        check_dispatcher(dispatcher, exact)
        self.d_model, self.d_ffn, self.num_experts = sizes = d_model, d_ffn, num_experts
        self.dispatcher_name, self.exact = dispatcher, exact
        self.layer_name = "MoE"
        self._seed = draw_layer_seed()
        self.router = make_router(
            router, router_options, d_model, num_experts, top_k, normalize_weights, init_std
        )
        self._traits = RouterTraits.of(self.router, num_experts)
        self.balancing = BalancingLosses(self._traits, {name: values[name] for name in LOSSES})
        self.capacity = Capacity(self._traits, capacity_factor, capacity_over, drop_by)
        self.nonfinite = NonFiniteGuard()
        ffn: dict[str, Any] = {"activation": activation, "bias": bias, "init_std": init_std}

        def make(ids: Iterable[int] | None) -> Experts:
            return make_experts(expert, *sizes, ids, layer_seed=self._seed, **ffn)

        placement = None if dispatcher == "local" else current_placement(num_experts)
        self.experts = make(placement.expert_ids if placement else None)
        shared = values["shared_expert"]
        self.shared_expert = make_shared_expert(shared, shared_expert_gate, d_model, **ffn)
        self.schedule: Schedule = LocalSchedule(num_experts)
        self.batch: GlobalBatch
        self.disconnect()
        self._observers: OrderedDict[int, RoutingObserver] = OrderedDict()
        self._passes = PassNumbers()
        if autoregressive:
            warn_if_not_causal(self._traits, self.layer_name)
        if placement and placement.remember:
            placement.remember(self, make)

    # ------------------------------------------------------------------------------ forward pass

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
                tensors (T, ...), the first of them (T, d_model). The router sees the first; the
                experts get their rows of all of them.
            mask: (...), False or 0 for the tokens to process. The others skip router, experts,
                losses and counts. Their number is read from the device.
            masked_values: output for masked tokens: a number, a tensor (d_model,), or for an
                integer mask a mapping from label to value. None is zero.
            token_ids: (...), vocabulary ids, for hash routing.
            sequence_ids: (...), integers, for rows that hold several sequences (packed documents):
                adjacent tokens with the same number form one sequence. Used only by
                ``sequence_balancing``. None: each row of the first dimension is one sequence.

        Returns:
            A tensor of the shape and dtype of ``x``; with modules as experts, what they return.

        Raises:
            ShapeError: if the last dimension is not ``d_model`` or the dtype is not floating; if
                the shape of a mask or of ids differs from the tokens', or its dtype is floating.
            ConfigError: if the router works on whole sequences, and ``mask`` or ``sequence_ids``
                breaks them up.
            UnmanagedExpertsError: if the experts are sharded and no strategy trains them.
            NonFiniteError: if the router's logits contain NaN or Inf, on the CPU; on CUDA, where
                this check would stall the device, FastMoEStrategy checks once per step.
        """
        per_token = {"mask": mask, "token_ids": token_ids, "sequence_ids": sequence_ids}
        if torch.compiler.is_dynamo_compiling() and traced.applies(self, x, mask):
            return traced.forward(self, x, **per_token)
        return self._forward(x, masked_values, per_token)

    # Opaque to torch.compile, which breaks its graph here; what is around it is compiled as usual.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, x: Any, masked_values: Any, per_token: dict[str, Tensor | None]) -> Any:
        inputs = read_inputs(x, self.d_model, self.layer_name, **per_token)
        context = self._context(inputs)
        routing = route(self.router_traits, inputs.tokens, context)
        self.nonfinite.look(routing.logits, self.layer_name, training=self.training)
        routing = self.capacity.limit(routing, context, self.router_traits)
        y, routing = self._run(inputs, routing)
        y = self._attach(y, routing, context)
        return inputs.restore(y, masked_values)

    def _context(self, inputs: TokenInputs) -> RoutingContext:
        """The router's context for this pass."""
        context = RoutingContext(
            training=self.training,
            grid=inputs.grid,
            positions=inputs.positions,
            sequence_ids=inputs.sequence_ids,
            token_ids=inputs.token_ids,
            capacity_factor=self.capacity.factor(training=self.training),
            seed=self._seed,
            batch=self.batch,
            layer=self.layer_name,
        )
        seen = getattr(self.router, "tokens_seen", None)
        if self.training and seen is not None:
            context.first_token = self._passes.first_token(
                seen, inputs.tokens.shape[0], self.batch, self.layer_name, replay=is_recomputing()
            )
        return context

    def _run(self, inputs: TokenInputs, routing: Routing) -> tuple[Any, Routing]:
        x = inputs.tokens
        rest = (routing, self.experts, self.shared_expert, self.layer_name)
        y, routing = self.schedule.run(inputs.to(self.experts.compute_dtype(x)), *rest)
        if isinstance(y, Tensor) and inputs.spec is None:
            y = y.to(x.dtype)
        return y, routing

    def _attach(self, y: Any, routing: Routing, context: RoutingContext) -> Any:
        """Attaches the losses, counts the load and calls the observers, once per pass."""
        replay = is_recomputing()
        if self.training:
            traits, router = self.router_traits, self.router
            y = self.balancing.attach(y, routing, context, traits, router, replay=replay)
            if not replay and isinstance(router, Router) and router.load_since_update is not None:
                router.load_since_update += routing.routed_counts()
        if self._observers and not replay:
            show_observers(self, routing)
        return y

    def register_routing_observer(self, observer: RoutingObserver) -> RemovableHandle:
        """Calls ``observer(layer, routing)`` at each forward pass, in training and evaluation."""
        return add_observer(self._observers, observer)

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)
        self.balancing.scale.follow(self)
        return self

    # --------------------------------------------------------------- running over several ranks

    def connect(self, name: str, batch: GlobalBatch | None, schedule: Schedule) -> None:
        """Connects the layer to the other ranks of a run.

        Args:
            name: the layer's name, for errors and to detect ranks in different layers.
            batch: access to the tokens of all ranks; None for a single rank.
            schedule: reaches the experts, wherever they are.
        """
        self.disconnect()
        self.layer_name, self.schedule, self.reference = name, schedule, Reference(self)
        self.batch = self.batch if batch is None else batch

    def disconnect(self) -> None:
        """Disconnects from the other ranks. A layer that holds only some experts then can't run."""
        if self.is_sharded or self.dispatcher_name not in ONE_RANK:
            self.schedule = UnmanagedSchedule(self.schedule.dispatcher, self.dispatcher_name)
        else:
            self.schedule = LocalSchedule(self.num_experts)
        self.batch = LocalBatch()
        self.nonfinite.policy = "raise"

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only some of the layer's experts."""
        return self.num_local_experts != self.num_experts

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, e."""
        return self.experts.num_local_experts

    @property
    def uses_global_batch(self) -> bool:
        """Whether forward passes, with the current settings, exchange counts over all ranks."""
        router, traits = self.router, self.router_traits
        asks = isinstance(router, Router) and (traits.random or traits.uses_batch)
        return asks or self.capacity.uses_batch or self.balancing.use_batch

    @property
    def exchanged_counts(self) -> int:
        """The largest number of counts in one such exchange."""
        slots = min(self.num_experts, max(self.top_k or 1, RESERVED_TOP_K))
        many = self.capacity.over == "global" or self.router_traits.uses_batch
        return (self.num_experts + 1) * slots + 1 if many else self.num_experts + 1

    # ---------------------------------------- settings that may change between two forward passes

    @property
    def router_traits(self) -> RouterTraits:
        """What the layer knows about its router; refreshed when the router is replaced."""
        if self._traits.router is not self.router:
            self._traits = RouterTraits.of(self.router, self.num_experts)
        return self._traits

    @property
    def top_k(self) -> int | None:
        """Experts per token, K; None if the router doesn't choose a fixed number."""
        name = "_top_k" if isinstance(self.router, Router) else "top_k"
        k: int | None = getattr(self.router, name, None)
        return k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if self.top_k is None:
            raise ConfigError(f"top_k={value!r}: {type(self.router).__name__} has no top_k.")
        self.router.top_k = value  # type: ignore[assignment]

    @property
    def capacity_factor(self) -> float | None:
        """The capacity factor in training; None is dropless."""
        return self.capacity.factor(training=True)

    @capacity_factor.setter
    def capacity_factor(self, value: float | None) -> None:
        self.capacity.set_factor(value, self.router_traits, training=True)

    @property
    def eval_capacity_factor(self) -> float | None:
        """The capacity factor in evaluation; None is dropless."""
        return self.capacity.factor(training=False)

    @eval_capacity_factor.setter
    def eval_capacity_factor(self, value: float | None) -> None:
        self.capacity.set_factor(value, self.router_traits, training=False)

    capacity_over = part_of("capacity", "over", "Whose tokens share an expert's slots.")
    drop_by = part_of("capacity", "drop_by", 'Which tokens are kept: by "position" or "score".')
    loss_coefficients = part_of("balancing", "coefficients", "Name of a loss -> its coefficient.")
    last_losses = part_of("balancing", "latest", "Name -> value in the latest training pass.")
    loss_scale = part_of("balancing", "scale", "Factor that the training loop applies to the loss.")
    nonfinite_policy = part_of("nonfinite", "policy", '"raise", "collect" or "ignore".')

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"num_experts={self.num_experts}, dispatcher={self.dispatcher_name}"
