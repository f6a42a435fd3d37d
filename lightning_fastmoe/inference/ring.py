"""Slots of GPU memory that the layers' experts pass through, copied while earlier layers compute.

Every pass needs the experts of every layer, in the same order. With K slots, layer i + K is copied
into the slot of layer i as soon as that has been computed; after the last layer comes the first, so
that passes follow one another without a gap. FlexGen (Sheng et al. 2023, arXiv 2303.06865) and
MoE-Gen (Xu et al. 2025, arXiv 2503.09716) overlap copies this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.pass_timer import PassTimer

_ALIGNMENT = 256


@dataclass(frozen=True)
class Stack:
    """The tensors of one layer's experts, in host memory.

    Args:
        tensors: on the CPU, contiguous.
        version: gives something else once the tensors have been changed, so that copies are old.
    """

    tensors: Sequence[Tensor]
    version: Callable[[], object] = lambda: None

    @property
    def slot_bytes(self) -> int:
        """Bytes that they take in a slot."""
        return sum(_aligned(_bytes(tensor)) for tensor in self.tensors)

    def views(self, memory: Tensor) -> list[Tensor]:
        """Tensors like these in a slot's ``memory (B,)`` uint8."""
        views, at = [], 0
        for tensor in self.tensors:
            size = _bytes(tensor)
            views.append(memory[at : at + size].view(tensor.dtype).view(tensor.shape))
            at += _aligned(size)
        return views


@dataclass
class _Slot:
    """GPU memory for the experts of one layer.

    Attributes:
        memory: (B,) uint8.
        layer: whose experts are there, or on their way; None for nobody's.
        version: of what was copied.
        filled: recorded by the copy stream when they are there.
        in_use: whether the layer computes.
    """

    memory: Tensor
    layer: int | None = None
    version: object = None
    filled: Any = None
    in_use: bool = False


@dataclass
class RingStatistics:
    """What a ring has done.

    Attributes:
        copied: bytes copied to the GPU.
        misses: layers that were needed before their copy had been started, because they didn't run
            in the order of the pass before.
    """

    copied: int = 0
    misses: int = 0


class ExpertRing:
    """Provides the experts of layers that run one after the other.

    Args:
        stacks: of each layer, in the order in which they are expected to run.
        device: where they are computed.
        slots: K, at least 2 to overlap copies; 1 uses the least memory.

    Attributes:
        statistics: what has been copied.
        timer: times copies and what waits for them, if there is one.
    """

    timer: PassTimer | None = None

    def __init__(self, stacks: Sequence[Stack], device: torch.device, slots: int) -> None:
        self._stacks, self._device = stacks, device
        self._slots = [
            _Slot(torch.empty(self._room(), dtype=torch.uint8, device=device))
            for _ in range(min(slots, len(stacks)))
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._successor = {n: (n + 1) % len(stacks) for n in range(len(stacks))}
        self._latest: int | None = None
        self.statistics = RingStatistics()
        self._fill()

    @property
    def slot_bytes(self) -> int:
        """Bytes of GPU memory of all slots."""
        return sum(slot.memory.numel() for slot in self._slots)

    def acquire(self, layer: int) -> list[Tensor]:
        """The tensors of a layer's experts on the device, until :meth:`release`.

        The current stream waits for their copy; the host doesn't.
        """
        if self._latest is not None:
            self._successor[self._latest] = layer  # the next pass goes the same way
        self._latest = layer
        slot = next((one for one in self._slots if one.layer == layer), None)
        if slot is None:
            self.statistics.misses += 1
            slot = next((one for one in self._slots if not one.in_use), None)
            if slot is None:
                raise ConfigError(
                    "Layers whose experts are offloaded can't run inside one another."
                )
            self._copy(layer, slot)
        elif slot.version != self._stacks[layer].version():
            self._changed(layer, slot)
        if slot.filled is not None:
            with nullcontext() if self.timer is None else self.timer.waiting():
                slot.filled.wait(torch.cuda.current_stream(self._device))
        slot.in_use = True
        return self._stacks[layer].views(slot.memory)

    def release(self, layer: int) -> None:
        """Lets a layer's slot be filled with the experts of one to come."""
        slot = next((one for one in self._slots if one.layer == layer and one.in_use), None)
        if slot is None:
            return  # its forward pass has failed before it began
        slot.in_use = False
        coming = self._next_to_copy(layer)
        if coming is not None:
            self._copy(coming, slot)

    def close(self) -> None:
        """Waits for the copies under way."""
        if self._stream is not None:
            self._stream.synchronize()
        self._slots.clear()

    def _room(self) -> int:
        """Bytes of a slot."""
        return max(stack.slot_bytes for stack in self._stacks)

    def _fill(self) -> None:
        """Starts to copy the first layers."""
        for n, slot in enumerate(self._slots):
            self._copy(n, slot)

    def _changed(self, layer: int, slot: _Slot) -> None:
        """Called if a layer has been changed since it was copied."""
        self._copy(layer, slot)

    def _next_to_copy(self, layer: int) -> int | None:
        """The first layer after ``layer`` that is in no slot; None if all to come are."""
        present = {slot.layer for slot in self._slots} - {layer}
        coming = self._successor[layer]
        for _ in self._stacks:
            if coming == layer:
                return None
            if coming not in present:
                return coming
            coming = self._successor[coming]
        return None

    def _copy(
        self, layer: int, slot: _Slot, transfer: Callable[[Stack, _Slot], None] | None = None
    ) -> None:
        """Starts to copy, after what the current stream still computes with the slot.

        Args:
            layer: whose experts.
            slot: to where.
            transfer: copies, in the stream for that; None is :meth:`_transfer`.
        """
        slot.layer = layer
        stack = self._stacks[layer]
        slot.version = stack.version()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            size = sum(map(_bytes, stack.tensors))
            with nullcontext() if self.timer is None else self.timer.copying(size):
                (transfer or self._transfer)(stack, slot)
            if self._stream is not None:
                slot.filled = torch.cuda.Event()
                slot.filled.record()
        self.statistics.copied += stack.slot_bytes

    def _transfer(self, stack: Stack, slot: _Slot) -> None:
        """Copies in the current stream."""
        for own, host in zip(stack.views(slot.memory), stack.tensors, strict=True):
            own.copy_(host, non_blocking=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
