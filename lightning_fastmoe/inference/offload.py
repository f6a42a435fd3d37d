"""Experts that stay in host memory and visit the GPU layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.layer import OffloadedLayer
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.inference.ring import ExpertRing, RingStatistics
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.grouped import ExpertGroups
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.nn.moe import MoE
from lightning_fastmoe.planning.offload import parse_bytes

_OFFLOADED: WeakSet[nn.Module] = WeakSet()
"""The modules whose parameters are offloaded."""


class OffloadedExperts:
    """What :func:`offload_experts` has set up; closing it undoes that.

    Attributes:
        slot_bytes: GPU memory of the slots.
        host_bytes: the experts' bytes in host memory.
        resident_bytes: the experts' bytes that stay on the GPU.
        cache_bytes: GPU memory in which single experts are kept.
    """

    def __init__(
        self,
        layers: Sequence[OffloadedLayer],
        resident: Sequence[OffloadedLayer],
        device: torch.device,
        slots: int,
        expert_cache: int = 0,
        groups: int = 1,
    ) -> None:
        self._layers, self._resident, self._groups = layers, resident, groups
        self.host_bytes = sum(layer.bytes for layer in layers)
        self.resident_bytes = sum(layer.bytes for layer in resident)
        self.slot_bytes = self.cache_bytes = 0
        self._pinned: PinnedMemory | None = None
        self._ring: ExpertRing | None = None
        self._hooks: list[RemovableHandle | ExpertGroups] = []
        self._running: tuple[int, int] | None = None  # the thread, and the layer that computes
        try:
            self._set_up(device, slots, expert_cache)
        except BaseException:
            self.close()
            raise

    def _set_up(self, device: torch.device, slots: int, expert_cache: int) -> None:
        _OFFLOADED.update(layer.module for layer in (*self._layers, *self._resident))
        if device.type == "cuda":
            self._pinned = PinnedMemory(t for layer in self._layers for t in layer.host)
        for layer in self._resident:
            layer.put([tensor.to(device) for tensor in layer.host])
        if self._layers:
            stacks = [part for layer in self._layers for part in layer.stacks(self._groups)]
            self._ring = ExpertRing(stacks, device, slots, expert_cache)
            self.slot_bytes, self.cache_bytes = self._ring.slot_bytes, self._ring.cache_bytes
        for number, layer in enumerate(self._layers):
            self._hooks += self._hook(number, layer)
            if self._groups > 1:
                groups = ExpertGroups(
                    layer.module, layer.ends(self._groups), partial(self._placed, number)
                )
                groups.install()
                self._hooks.append(groups)

    @property
    def statistics(self) -> RingStatistics:
        """What has been copied so far."""
        return RingStatistics() if self._ring is None else self._ring.statistics

    def close(self) -> None:
        """The experts are ordinary parameters on the CPU again, and no host memory is pinned."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            if self._ring is not None:
                self._ring.close()
        finally:  # also if the GPU has failed meanwhile
            self._ring = self._running = None
            for layer in (*self._layers, *self._resident):
                layer.take_back()
                _OFFLOADED.discard(layer.module)
            if self._pinned is not None:
                self._pinned.close()
                self._pinned = None

    def _forget_interrupted(self) -> None:
        """Ctrl-C ends a forward pass without its hooks; the next one tidies up."""
        if self._running is None:
            return
        if self._running[0] != threading.get_ident():
            raise ConfigError("Layers whose experts are offloaded can't run in several threads.")
        self._finish()

    def _finish(self) -> None:
        assert self._running is not None
        assert self._ring is not None
        number = self._running[1]
        self._running = None
        layer = self._layers[number // self._groups]
        is_kept = layer.take_back()
        self._ring.release(number)
        if not is_kept:
            raise ConfigError(
                f"A pass of few tokens has changed the parameters of {type(layer.module).__name__}"
                " in place, while only the experts that they chose were on the device: change them"
                " between passes."
            )

    def _place(self, number: int, call: RoutedCall | None) -> None:
        """The parameters of a layer are those of a stack on the device, until :meth:`_finish`."""
        assert self._ring is not None
        self._forget_interrupted()
        self._running = (threading.get_ident(), number)
        tensors = self._ring.acquire(number, call)
        holds_all = self._groups == 1 and self._ring.holds_all(number)
        self._layers[number // self._groups].put(tensors, holds_all)

    @contextmanager
    def _placed(self, layer: int, group: int, call: RoutedCall) -> Generator[None, None, None]:
        """The parameters of a layer are those of a group of its experts."""
        number = layer * self._groups + group
        self._place(number, call)
        try:
            yield
        finally:
            if self._running == (threading.get_ident(), number):
                self._finish()

    def _hook(self, number: int, layer: OffloadedLayer) -> list[RemovableHandle]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before(module: nn.Module, args: Any) -> None:
            if module is not layer.module:
                return  # a copy of the model, which has parameters of its own
            if torch.is_grad_enabled():
                raise ConfigError(
                    f"{type(module).__name__} has its experts in host memory, so it can't be"
                    " trained: run it under torch.no_grad() or torch.inference_mode()."
                )
            if self._groups == 1:
                self._place(number, layer.call(args))
            elif layer.experts is None or layer.experts.routed_call(args) is None:
                raise ConfigError(
                    f"{type(module).__name__} is not computed in groups of experts: use"
                    ' experts_implementation="fastmoe", train no single experts, and do not replace'
                    " its forward; or drop groups."
                )

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is layer.module and self._running == (threading.get_ident(), number):
                self._finish()

        layer.hook = layer.module.register_forward_pre_hook(before)
        return [
            layer.hook,
            layer.module.register_forward_hook(after, always_call=True),
        ]


@torch.inference_mode(False)
@torch.no_grad()
def offload_experts(
    model: nn.Module,
    device: torch.device | str,
    *,
    slots: int = 2,
    resident_layers: int = 0,
    expert_cache: str | int | None = None,
    groups: int = 1,
) -> OffloadedExperts:
    """Keeps the experts of a model in host memory, and moves the rest to a device.

    The experts of a layer are copied to the device while earlier layers compute, and computed as
    they would be there: the results have the same bits. Copies cost nothing once a pass has so many
    tokens that a layer computes for longer than its experts take to be copied. Outside of their
    forward passes the parameters are those in host memory, so ``state_dict`` and
    ``load_state_dict`` work as usual; only changes made through ``parameter.data`` go unnoticed.

    If a pass has so few tokens that they choose few of a layer's experts, as in generation, only
    those are copied, once the router has chosen them. Inside of such a pass the parameters of the
    others hold anything, which nothing computes with.

    Args:
        model: on the CPU, with layers of this package or stacked experts of transformers with
            ``experts_implementation="fastmoe"``.
        device: computes.
        slots: GPU memory for the experts of so many layers.
        resident_layers: so many layers, the last ones, keep their experts on the device.
        expert_cache: bytes of GPU memory, such as ``"4GB"``, for experts that passes of few tokens
            have used last; divided between the layers. None keeps none but what is in the slots.
        groups: divides each layer's experts, where those of a whole one are too large for a slot. A
            slot then holds one group, which is copied while another computes. The results may
            differ from those of whole layers by the rounding of sums.

    Returns:
        An object whose ``close`` undoes it, but leaves the rest of the model on the device.

    Raises:
        ConfigError: if an argument is out of range, the model has no such experts, or they are
            somewhere else than on the CPU, sharded, used by several layers, or offloaded already.
    """
    device = torch.device(device)
    if device == torch.device("cuda"):  # which one must not change later
        device = torch.device("cuda", torch.cuda.current_device())
    layers = _layers(model)
    check_slots(len(layers), slots, resident_layers)
    cut = len(layers) - resident_layers
    cache = 0 if expert_cache is None else parse_bytes(expert_cache)
    if cache and not cut:
        raise ConfigError(f"expert_cache={cache}: every layer is resident. Leave one of both out.")
    if groups != 1:
        _check_stacked(groups, layers[:cut])
    offloaded = OffloadedExperts(layers[:cut], layers[cut:], device, slots, cache, groups)
    try:
        _move_rest(model, device, layers)
    except BaseException:
        offloaded.close()
        raise
    return offloaded


def check_slots(layers: int, slots: int, resident_layers: int) -> None:
    """Checks both numbers against a model's number of layers with experts.

    Raises:
        ConfigError: if one is out of range.
    """
    if slots < 1 or not 0 <= resident_layers <= layers:
        raise ConfigError(
            f"slots={slots} must be at least 1, and resident_layers={resident_layers} between 0"
            f" and the model's {layers} layers."
        )


def check_groups(groups: int, num_experts: int) -> None:
    """Checks the number of groups against a layer's number of experts.

    Raises:
        ConfigError: if it is out of range.
    """
    if not 1 <= groups <= num_experts:
        raise ConfigError(
            f"groups={groups} must be between 1 and the {num_experts} experts of a layer."
        )


def _check_stacked(groups: int, layers: Sequence[OffloadedLayer]) -> None:
    for layer in layers:
        if layer.experts is None:
            raise ConfigError(
                f"groups={groups} divides stacks of experts, but those of"
                f" {type(layer.module).__name__} are modules. Leave it out."
            )
        check_groups(groups, layer.experts.num_experts)


def _layers(model: nn.Module) -> list[OffloadedLayer]:
    layers: list[OffloadedLayer] = []
    seen: set[int] = set()
    for name, layer in expert_layers(model):
        if layer.is_sharded:
            raise ConfigError(f"{name} holds only some of its experts: offload the whole model.")
        holder = layer.experts.holder
        if holder in _OFFLOADED:
            raise ConfigError(
                f"The experts of {name} are offloaded already: close what offload_experts returned."
            )
        parameters = list(holder.parameters())
        for parameter in parameters:
            if parameter.device.type != "cpu":
                raise ConfigError(
                    f"The experts of {name} are on {parameter.device}, and not on the CPU, where"
                    " they are to stay: build or load the model there."
                )
            if not parameter.is_contiguous():
                raise ConfigError(f"The experts of {name} are not contiguous.")
            if id(parameter) in seen:
                raise ConfigError(f"The experts of {name} are those of another layer, too.")
            seen.add(id(parameter))
        stacked = _stacks(layer.experts, parameters)
        reads_all = isinstance(layer, MoE) and layer.top_k is None
        layers.append(OffloadedLayer(holder, parameters, stacked, reads_all))
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no experts to offload: neither layers of this package, nor"
            ' stacked experts of transformers with experts_implementation="fastmoe".'
        )
    return layers


def _stacks(experts: Experts, parameters: Sequence[nn.Parameter]) -> Experts | None:
    """The experts, if each of the parameters is one of their stacks."""
    stacks = {id(getattr(experts.holder, name, None)) for name in experts.stack_names}
    if {id(parameter) for parameter in parameters} != stacks:
        return None
    whole = all(parameter.shape[:1] == (experts.num_experts,) for parameter in parameters)
    return experts if whole else None


def _move_rest(model: nn.Module, device: torch.device, layers: Sequence[OffloadedLayer]) -> None:
    """Moves the model by its own ``to``, which metrics and Lightning's modules extend."""
    parts = [part for layer in layers for part in layer.module.modules()]
    kept = [part._parameters for part in parts]
    for part in parts:
        part._parameters = {}
    try:
        model.to(device)
    finally:
        for part, parameters in zip(parts, kept, strict=True):
            part._parameters = parameters
