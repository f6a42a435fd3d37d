"""Experts that stay in host memory and visit the GPU layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.inference.ring import ExpertRing, RingStatistics, Stack
from lightning_fastmoe.nn.expert_layers import expert_layers


class _Layer:
    """The experts of one layer: parameters in host memory, swapped for a slot's while they compute.

    Args:
        module: computes with the parameters.
        parameters: on the CPU.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.module, self.parameters = module, parameters
        self.host = [parameter.data for parameter in parameters]

    @property
    def bytes(self) -> int:
        """Of the parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.host)

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor


class OffloadedExperts:
    """What :func:`offload_experts` has set up; closing it undoes that.

    Attributes:
        slot_bytes: GPU memory of the slots.
        host_bytes: the experts' bytes in host memory.
        resident_bytes: the experts' bytes that stay on the GPU.
    """

    def __init__(
        self, layers: Sequence[_Layer], resident: Sequence[_Layer], device: torch.device, slots: int
    ) -> None:
        self._layers, self._resident = layers, resident
        self.host_bytes = sum(t.numel() * t.element_size() for one in layers for t in one.host)
        self.resident_bytes = sum(
            t.numel() * t.element_size() for one in resident for t in one.host
        )
        on_host = [tensor for layer in layers for tensor in layer.host]
        self._pinned = PinnedMemory(on_host) if device.type == "cuda" else None
        for layer in resident:
            layer.put([tensor.to(device) for tensor in layer.host])
        self._ring: ExpertRing | None = None
        self.slot_bytes = 0
        if layers:
            self._ring = ExpertRing([Stack(layer.host) for layer in layers], device, slots)
            self.slot_bytes = self._ring.slot_bytes
        self._hooks: list[RemovableHandle] = []
        for number, layer in enumerate(layers):
            self._hooks += self._hook(number, layer)

    @property
    def statistics(self) -> RingStatistics:
        """What has been copied so far."""
        return RingStatistics() if self._ring is None else self._ring.statistics

    def close(self) -> None:
        """The experts are ordinary parameters on the CPU again, and no host memory is pinned."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        for layer in (*self._layers, *self._resident):
            layer.put(layer.host)
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None

    def _hook(self, number: int, layer: _Layer) -> list[RemovableHandle]:
        ring = self._ring
        assert ring is not None

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled():
                raise ConfigError(
                    f"{type(module).__name__} has its experts in host memory, so it can't be"
                    " trained: run it under torch.no_grad() or torch.inference_mode()."
                )
            layer.put(ring.acquire(number))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, args: Any, output: Any) -> None:
            layer.put(layer.host)
            ring.release(number)

        return [
            layer.module.register_forward_pre_hook(before),
            layer.module.register_forward_hook(after, always_call=True),
        ]


def offload_experts(
    model: nn.Module, device: torch.device | str, *, slots: int = 2, resident_layers: int = 0
) -> OffloadedExperts:
    """Keeps the experts of a model in host memory, and moves the rest to a device.

    The experts of a layer are copied to the device while earlier layers compute, and computed as
    they would be there: the results have the same bits. Copies cost nothing once a pass has so many
    tokens that a layer computes for longer than its experts take to be copied. Outside of their
    forward passes the parameters are those in host memory, so ``state_dict`` works as usual.

    Args:
        model: on the CPU, with layers of this package or stacked experts of transformers with
            ``experts_implementation="fastmoe"``.
        device: computes.
        slots: GPU memory for the experts of so many layers.
        resident_layers: so many layers, the last ones, keep their experts on the device.

    Returns:
        An object whose ``close`` undoes it, but leaves the rest of the model on the device.

    Raises:
        ConfigError: if an argument is out of range, the model has no such experts, or they are
            somewhere else than on the CPU, sharded, or used by several layers.
    """
    device = torch.device(device)
    layers = _layers(model)
    if slots < 1 or not 0 <= resident_layers <= len(layers):
        raise ConfigError(
            f"slots={slots} must be at least 1, and resident_layers={resident_layers} between 0"
            f" and the model's {len(layers)} layers."
        )
    cut = len(layers) - resident_layers
    offloaded = OffloadedExperts(layers[:cut], layers[cut:], device, slots)
    experts = {id(parameter) for layer in layers for parameter in layer.parameters}
    _move_rest(model, device, experts)
    return offloaded


def _layers(model: nn.Module) -> list[_Layer]:
    layers: list[_Layer] = []
    seen: set[int] = set()
    for name, layer in expert_layers(model):
        if layer.is_sharded:
            raise ConfigError(f"{name} holds only some of its experts: offload the whole model.")
        holder = layer.experts.holder
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


@torch.no_grad()
def _move_rest(model: nn.Module, device: torch.device, excluded: set[int]) -> None:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in excluded:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
