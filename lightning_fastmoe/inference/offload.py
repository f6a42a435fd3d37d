"""Experts that stay in host memory and visit the GPU layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.inference.ring import ExpertRing, RingStatistics, Stack
from lightning_fastmoe.nn.expert_layers import expert_layers

_OFFLOADED: WeakSet[nn.Module] = WeakSet()
"""The modules whose parameters are offloaded."""


class _Layer:
    """The experts of one layer: parameters in host memory, swapped for a slot's while they compute.

    Args:
        module: computes with the parameters.
        parameters: on the CPU.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.module, self.parameters = module, parameters
        self.host = [parameter.data for parameter in parameters]
        self._placed: Sequence[torch.Tensor] = self.host
        self._placed_at = self.version()

    @property
    def bytes(self) -> int:
        """Of the parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.host)

    def version(self) -> tuple[int, ...]:
        """Changes when a parameter is changed in place."""
        return tuple(0 if p.is_inference() else p._version for p in self.parameters)

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """The parameters are these tensors, until :meth:`take_back`."""
        if not all(map(_is, self.parameters, self.host)):
            raise ConfigError(
                f"The parameters of {type(self.module).__name__} have been moved, converted or"
                " replaced since they were offloaded: do that before, or close what"
                " offload_experts returned, and offload them again."
            )
        self._placed, self._placed_at = tensors, self.version()
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def take_back(self) -> None:
        """The parameters are in host memory, also what has changed them in place meanwhile."""
        placed, self._placed = self._placed, self.host
        for parameter, tensor, host in zip(self.parameters, placed, self.host, strict=True):
            if _is(parameter, tensor):  # else it has been given other memory, and keeps it
                parameter.data = host
        if placed is not self.host and self.version() != self._placed_at:
            for tensor, host in zip(placed, self.host, strict=True):
                host.copy_(tensor)


class OffloadedExperts:
    """What :func:`offload_experts` has set up; closing it undoes that.

    Attributes:
        slot_bytes: GPU memory of the slots.
        host_bytes: the experts' bytes in host memory.
        resident_bytes: the experts' bytes that stay on the GPU.
    """

    def __init__(
        self,
        layers: Sequence[_Layer],
        resident: Sequence[_Layer],
        device: torch.device,
        slots: int,
        make_ring: Callable[..., ExpertRing],
    ) -> None:
        self._layers, self._resident = layers, resident
        self.host_bytes = sum(layer.bytes for layer in layers)
        self.resident_bytes = sum(layer.bytes for layer in resident)
        self.slot_bytes = 0
        self._pinned: PinnedMemory | None = None
        self._ring: ExpertRing | None = None
        self._hooks: list[RemovableHandle] = []
        self._make_ring = make_ring
        self._running: tuple[int, int] | None = None  # the thread, and the layer that computes
        try:
            self._set_up(device, slots)
        except BaseException:
            self.close()
            raise

    def _set_up(self, device: torch.device, slots: int) -> None:
        _OFFLOADED.update(layer.module for layer in (*self._layers, *self._resident))
        if device.type == "cuda":
            self._pinned = PinnedMemory(t for layer in self._layers for t in layer.host)
        for layer in self._resident:
            layer.put([tensor.to(device) for tensor in layer.host])
        if self._layers:
            stacks = [Stack(layer.host, layer.version) for layer in self._layers]
            self._ring = self._make_ring(stacks, device, slots)
            self.slot_bytes = self._ring.slot_bytes
        for number, layer in enumerate(self._layers):
            self._hooks += self._hook(number, layer)

    @property
    def ring(self) -> ExpertRing | None:
        """What copies the experts; None if all are resident."""
        return self._ring

    @property
    def statistics(self) -> RingStatistics:
        """What has been copied so far."""
        return RingStatistics() if self._ring is None else self._ring.statistics

    def time_by(self, timer: PassTimer) -> None:
        """Has copies, and what waits for them, timed by ``timer`` from now on."""
        if self._ring is not None:
            self._ring.timer = timer

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
        self._layers[number].take_back()
        self._ring.release(number)

    def _hook(self, number: int, layer: _Layer) -> list[RemovableHandle]:
        ring = self._ring
        assert ring is not None

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before(module: nn.Module, args: Any) -> None:
            if module is not layer.module:
                return  # a copy of the model, which has parameters of its own
            if torch.is_grad_enabled():
                raise ConfigError(
                    f"{type(module).__name__} has its experts in host memory, so it can't be"
                    " trained: run it under torch.no_grad() or torch.inference_mode()."
                )
            self._forget_interrupted()
            self._running = (threading.get_ident(), number)
            layer.put(ring.acquire(number))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is layer.module and self._running == (threading.get_ident(), number):
                self._finish()

        return [
            layer.module.register_forward_pre_hook(before),
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
    make_ring: Callable[..., ExpertRing] = ExpertRing,
) -> OffloadedExperts:
    """Keeps the experts of a model in host memory, and moves the rest to a device.

    The experts of a layer are copied to the device while earlier layers compute, and computed as
    they would be there: the results have the same bits. Copies cost nothing once a pass has so many
    tokens that a layer computes for longer than its experts take to be copied. Outside of their
    forward passes the parameters are those in host memory, so ``state_dict`` and
    ``load_state_dict`` work as usual; only changes made through ``parameter.data`` go unnoticed.

    Args:
        model: on the CPU, with layers of this package or stacked experts of transformers with
            ``experts_implementation="fastmoe"``.
        device: computes.
        slots: GPU memory for the experts of so many layers.
        resident_layers: so many layers, the last ones, keep their experts on the device.
        make_ring: another ring, for several processes.

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
    offloaded = OffloadedExperts(layers[:cut], layers[cut:], device, slots, make_ring)
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


def offloadable(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each layer that :func:`offload_experts` keeps in host memory, in its order.

    Raises:
        ConfigError: as that does.
    """
    return [list(layer.parameters) for layer in _layers(model)]


def _layers(model: nn.Module) -> list[_Layer]:
    layers: list[_Layer] = []
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
        layers.append(_Layer(holder, parameters))
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no experts to offload: neither layers of this package, nor"
            ' stacked experts of transformers with experts_implementation="fastmoe".'
        )
    return layers


def _is(parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
    """Whether a parameter is in the memory of a tensor."""
    return (
        parameter.data_ptr() == tensor.data_ptr()
        and parameter.device == tensor.device
        and parameter.dtype == tensor.dtype
        and parameter.shape == tensor.shape
    )


def _move_rest(model: nn.Module, device: torch.device, layers: Sequence[_Layer]) -> None:
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
