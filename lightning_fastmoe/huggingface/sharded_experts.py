"""Shards the experts of transformers' models in place, with their names and layouts.

The module of a layer keeps its class, its ``num_experts`` (which routers and losses read) and the
names of its parameters, of which each rank keeps the slices of its experts. A layer's router and
everything around it stay transformers'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError, UnmanagedExpertsError
from lightning_fastmoe.huggingface.experts_class import (
    FLAGS,
    NAME,
    check_ids,
    check_inputs,
    only_in_range,
    stacked_weights,
)
from lightning_fastmoe.huggingface.experts_view import TransformersExperts
from lightning_fastmoe.nn.attached_loss import is_recomputing
from lightning_fastmoe.nn.dispatch import ONE_RANK, check_dispatcher
from lightning_fastmoe.nn.expert_layers import KINDS, ExpertLayer
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.base import describe_ids
from lightning_fastmoe.nn.experts.trained import TRAINED
from lightning_fastmoe.nn.global_batch import GlobalBatch
from lightning_fastmoe.nn.hooks import watch_hooks
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.nonfinite import NonFiniteGuard
from lightning_fastmoe.nn.observers import RoutingObserver, add_observer, show_observers
from lightning_fastmoe.nn.opaque import Reference, observe
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import LocalSchedule, Schedule, UnmanagedSchedule
from lightning_fastmoe.ops.kernels import accumulation_dtype

_LAYER = "_fastmoe_layer"
_END = ".experts"


class TransformersLayer:
    """An :class:`~lightning_fastmoe.nn.expert_layers.ExpertLayer` around transformers' experts.

    Args:
        module: the module of experts, whole.

    Attributes:
        module: the same; its forward pass exchanges the tokens.
    """

    uses_global_batch = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._experts = TransformersExperts(module)
        self.num_experts = self._experts.num_experts
        self.layer_name = type(module).__name__
        self.dispatcher_name, self.exact = "auto", False
        self.nonfinite = NonFiniteGuard()
        self.schedule: Schedule = LocalSchedule(self.num_experts)
        self._observers: OrderedDict[int, RoutingObserver] = OrderedDict()
        self.reference: Reference | None = None
        self.disconnect()

    @property
    def experts(self) -> Experts:
        """The experts on this rank."""
        return self._experts

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, e."""
        return self._experts.num_local_experts

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only some of the layer's experts."""
        return self.num_local_experts != self.num_experts

    @property
    def top_k(self) -> int | None:
        """``num_experts_per_tok`` of the model's config; None if it is called otherwise."""
        k = getattr(self.module.config, "num_experts_per_tok", None)
        return k if isinstance(k, int) else None

    @property
    def exchanged_counts(self) -> int:
        """The largest number of counts in an exchange over all ranks."""
        return self.num_experts + 1

    def connect(self, name: str, batch: GlobalBatch | None, schedule: Schedule) -> None:
        """See :class:`~lightning_fastmoe.nn.expert_layers.ExpertLayer`."""
        self.layer_name, self.schedule, self.reference = name, schedule, Reference(self)
        watch_hooks(self.module)

    def disconnect(self) -> None:
        """Disconnects from the other ranks. A layer that holds only some experts then can't run."""
        if self.is_sharded or self.dispatcher_name not in ONE_RANK:
            self.schedule = UnmanagedSchedule(self.schedule.dispatcher, self.dispatcher_name)
        else:
            self.schedule = LocalSchedule(self.num_experts)
        self.nonfinite.policy = "ignore"

    @property
    def training(self) -> bool:
        """Whether the module of experts is training."""
        return self.module.training

    def see(self, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Looks for NaN and Inf, which a router's weights have where its logits do, and observes.

        Args:
            top_k_index: (T, K), E for dropped slots.
            top_k_weights: (T, K).
        """
        self.nonfinite.look(top_k_weights, self.layer_name, training=self.training)
        if self._observers and not is_recomputing():
            self._show(top_k_index, top_k_weights)

    def see_in_graph(self, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """:meth:`see` as a compiler traces it; returns the weights to go on with."""
        look = self.nonfinite.look_in_graph
        weights = look(top_k_weights, top_k_weights, training=self.training)
        if len(self._observers) > 0:  # dynamo guards a dict's length, but not its truth
            if self.reference is None:  # no strategy has connected it
                self._show(top_k_index, top_k_weights)
            else:
                seen = self._seen(top_k_index, top_k_weights.detach())
                observe(
                    *(self.reference.observed, self.reference.handle),
                    *(seen.logits, seen.scores, seen.weights, seen.expert_ids, seen.active),
                    *(None, None),
                )
        return weights

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _show(self, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        show_observers(self, self._seen(top_k_index, top_k_weights))

    def _seen(self, top_k_index: Tensor, top_k_weights: Tensor) -> Routing:
        ids = top_k_index.to(torch.int64)
        active = ids < self.num_experts
        return self._chosen(ids.masked_fill(~active, 0), top_k_weights, active)

    # Opaque to torch.compile: the exchange between ranks reads counts on the host. Where it can,
    # it takes traced_experts.forward in place of this.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """:func:`~lightning_fastmoe.huggingface.experts_interface.experts_forward`, sharded."""
        up = stacked_weights(self.module)[0]
        check_inputs(self.module, up, hidden_states, top_k_index, top_k_weights)
        self.see(top_k_index, top_k_weights)
        dtype = self._experts.compute_dtype(hidden_states)
        x = hidden_states.to(dtype)
        routing = self._routing(top_k_index, top_k_weights.to(accumulation_dtype(dtype)))
        inputs = TokenInputs([x], None, (x.shape[0],))
        out: Tensor
        out, _ = self.schedule.run(inputs, routing, self._experts, None, self.layer_name)
        return out.to(hidden_states.dtype)

    @staticmethod
    def leaves_out_dropped(x: Tensor) -> bool:
        """Whether dropped pairs of tokens are not sent: where looking for them costs no wait."""
        return x.device.type == "cpu"

    def _routing(self, ids: Tensor, weights: Tensor) -> Routing:
        """The pairs to send."""
        ids = check_ids(ids, self.num_experts)
        active = ids < self.num_experts if self.leaves_out_dropped(ids) else None
        if active is not None and bool(active.all()):
            active = None
        ids, weights = only_in_range(ids, weights, self.num_experts)
        return self._chosen(ids, weights, active)

    def _chosen(self, ids: Tensor, weights: Tensor, active: Tensor | None) -> Routing:
        # transformers' router keeps its logits to itself: NaN rather than something plausible.
        unknown = weights.new_full((), torch.nan).expand(ids.shape[0], self.num_experts)
        return Routing(unknown, unknown, weights, ids, active)

    def register_routing_observer(self, observer: RoutingObserver) -> RemovableHandle:
        """Calls ``observer(layer, routing)`` at each forward pass in this implementation.

        ``routing`` has the chosen experts and their weights; its logits and scores are NaN.
        """
        return add_observer(self._observers, observer)

    def take_forward(self) -> None:
        """Makes the module refuse other implementations, which take its weights for all experts."""
        vars(self.module)["forward"] = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.module.config._experts_implementation  # type: ignore[union-attr]
        if chosen != NAME:
            raise UnmanagedExpertsError(
                f"{self.layer_name} holds {self.num_local_experts} of {self.num_experts} experts,"
                f" which experts_implementation={chosen!r} would take for all of them. Keep"
                f' "{NAME}", or load the checkpoint into a new model on one device.'
            )
        return type(self.module).forward(self.module, *args, **kwargs)


def layer_of(module: nn.Module) -> TransformersLayer | None:
    """The layer of a module of experts; None before a strategy has looked for it."""
    return getattr(module, _LAYER, None)


def choose_dispatcher(model: nn.Module, name: str, *, exact: bool = False) -> None:
    """Chooses how tokens reach the sharded experts of transformers' models inside ``model``.

    Call it before training; without it, it is "auto".

    Args:
        model: has the experts.
        name: a name of :data:`~lightning_fastmoe.nn.dispatch.DISPATCHERS`; "local" keeps all
            experts on every rank.
        exact: as in :class:`~lightning_fastmoe.MoE`.

    Raises:
        ConfigError: if the name is unknown or can't be exact, or the model has no such experts.
    """
    check_dispatcher(name, exact)
    layers = [layer for _, layer in kind.layers(model)]
    if not layers:
        raise ConfigError(
            f"choose_dispatcher({type(model).__name__}, {name!r}): the model has no experts of"
            " transformers. For MoE give dispatcher= to the layer."
        )
    for layer in layers:
        layer.dispatcher_name, layer.exact = name, exact
        layer.disconnect()


class _Kind:
    """The kind of layers of which transformers' decorated modules are the experts."""

    def find(self, module: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
        """Modules whose experts are ``NAME.experts.PARAMETER (E, ...)`` on checkpoints, too."""
        yield from self.layers(module)

    def layers(self, module: nn.Module) -> Iterator[tuple[str, TransformersLayer]]:
        for path, experts in _decorated(module):
            layer = layer_of(experts)
            if layer is None and path.endswith(_END) and _is_stacked(experts):
                layer = vars(experts)[_LAYER] = TransformersLayer(experts)
            if layer is not None:
                yield path.removesuffix(_END), layer

    def check(self, module: nn.Module) -> None:
        paths: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            paths.setdefault(id(parameter), []).append(name)
        for path, experts in _decorated(module):
            layer = layer_of(experts)
            if layer is None or (not layer.is_sharded and layer.dispatcher_name != "local"):
                why = (
                    _why_not_implemented(experts)
                    or _why_not_sharded(path, experts, paths)
                    or _why_not_called(path, module)
                )
                if why is not None:
                    raise ConfigError(
                        f"The experts of {path} ({type(experts).__name__}) can't be sharded over"
                        f" ranks: {why}. Or train with FastMoEStrategy(expert_parallel_size=1),"
                        " which keeps all experts on every rank."
                    )

    def guard(self, module: nn.Module) -> None:
        sharded = {id(layer.module): layer for _, layer in self.layers(module) if layer.is_sharded}
        for layer in sharded.values():
            layer.take_forward()
        for part in module.modules():
            first = next((sharded[id(m)] for m in part.modules() if id(m) in sharded), None)
            for name in ("save_pretrained", "push_to_hub"):  # the latter creates a repository first
                if first is not None and callable(getattr(part, name, None)):
                    vars(part)[name] = _Refusal(first)


class _Refusal:
    """Replaces ``save_pretrained`` of a model that holds some experts only."""

    def __init__(self, layer: TransformersLayer) -> None:
        self._layer = layer

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        layer = self._layer
        raise UnmanagedExpertsError(
            f"save_pretrained would write experts {describe_ids(layer.experts.local_ids)} of"
            f" {layer.layer_name} as all {layer.num_experts}. On every rank call"
            " lightning_fastmoe.huggingface.save_pretrained(trainer, path), save_adapters(trainer,"
            " path) for adapters alone, or save a checkpoint and use `lightning-fastmoe checkpoint"
            " export`."
        )


def _decorated(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of classes with transformers' decorator, whatever implementation they use."""
    for path, part in module.named_modules():
        config = getattr(part, "config", None)
        says = all(isinstance(getattr(part, flag, None), bool) for flag in FLAGS)
        if says and hasattr(type(part), "_apply_gate") and config is not None:
            yield path.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip("."), part


def _is_stacked(experts: Any) -> bool:
    """Whether each of the module's parameters has a row per expert, as a checkpoint says it has."""
    number = getattr(experts, "num_experts", None)
    own = dict(experts.named_parameters(recurse=False))
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in own.values()]
    return isinstance(number, int) and bool(own) and all(s[:1] == (number,) for s in shapes)


def _why_not_implemented(experts: Any) -> str | None:
    chosen = getattr(experts.config, "_experts_implementation", None)
    if chosen == NAME:
        return None
    return (
        f"they use experts_implementation={chosen!r}, which knows one device. Load the model with"
        f' from_pretrained(..., experts_implementation="{NAME}") or call'
        f' model.set_experts_implementation("{NAME}")'
    )


def _why_not_sharded(path: str, experts: Any, paths: dict[int, list[str]]) -> str | None:
    """Why a module's parameters are not a row per expert of parameters of its own."""
    if path.endswith(".base_layer"):
        return (
            "PEFT's target_parameters adapts them, which computes with W + BA as a whole in each"
            " pass. Leave it out, and call lightning_fastmoe.huggingface.add_lora(model, rank,"
            " alpha) after get_peft_model: its adapters are sharded with the experts, and files"
            " are PEFT's"
        )
    stacked_weights(experts)  # raises what this package can't compute
    own = dict(experts.named_parameters(recurse=False))
    inside = [
        name
        for name, _ in experts.named_parameters()
        if name not in own and not name.startswith(f"{TRAINED}.")
    ]
    inside += [name for name, _ in experts.named_buffers()]
    if inside:
        return f"{', '.join(inside)} has no row for each expert"
    if not _is_stacked(experts):
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        return f"num_experts={getattr(experts, 'num_experts', None)} does not fit {shapes}"
    if not path.endswith(_END):
        return "checkpoints find experts by the name 'experts', which this module doesn't have"
    for name, parameter in own.items():
        if len(names := paths[id(parameter)]) > 1:
            return f"{name} is tied ({', '.join(names)}), and each would become its own copy"
    if "forward" in vars(experts):
        return "its forward was replaced (by device_map=, say), and would not exchange tokens"
    return None


def _why_not_called(path: str, module: nn.Module) -> str | None:
    """Why the block that the experts belong to may use their weights itself."""
    block = path.removesuffix(_END)
    if "forward" in vars(module.get_submodule(block)):
        return f"the forward of {block} was replaced, and may read their weights itself"
    return None


kind = _Kind()
"""The kind of these layers."""
KINDS.append(kind)
