"""Slots of GPU memory that the layers' experts pass through, copied while earlier layers compute.

Every pass needs the experts of every layer, in the same order. With K slots, layer i + K is copied
into the slot of layer i as soon as that has been computed; after the last layer comes the first, so
that passes follow one another without a gap. FlexGen (Sheng et al. 2023, arXiv 2303.06865) and
MoE-Gen (Xu et al. 2025, arXiv 2503.09716) overlap copies this way.

A pass of few tokens needs few experts. Those are copied once the layer's router has chosen them,
into their places in a slot; the other places hold whatever was there. The pass after it is taken to
have few tokens, too, so that nothing is copied ahead; a wrong guess costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.expert_cache import ExpertCache, runs
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.inference.pinned import copy_async
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.planning.few_tokens import are_few

_ALIGNMENT = 256


@dataclass(frozen=True)
class Stack:
    """The tensors of one layer's experts, in host memory.

    Args:
        tensors: on the CPU, contiguous.
        version: gives something else once the tensors have been changed, so that copies are old.
        experts: E, if each tensor is (E, ...) and single experts may be copied; else 0.
    """

    tensors: Sequence[Tensor]
    version: Callable[[], object] = lambda: None
    experts: int = 0

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
        experts: those of the layer that are there; None for all.
        filled: recorded by the copy stream when they are there.
        in_use: whether the layer computes.
    """

    memory: Tensor
    layer: int | None = None
    version: object = None
    experts: set[int] | None = None
    filled: Any = None
    in_use: bool = False


@dataclass
class RingStatistics:
    """What a ring has done.

    Attributes:
        copied: bytes copied to the GPU.
        misses: layers that were needed before their copy had been started, because they didn't run
            in the order of the pass before.
        expert_hits: experts that passes of few tokens chose, and that were on the GPU.
        expert_misses: such experts that had to be copied.
    """

    copied: int = 0
    misses: int = 0
    expert_hits: int = 0
    expert_misses: int = 0


class ExpertRing:
    """Provides the experts of layers that run one after the other.

    Args:
        stacks: of each layer, in the order in which they are expected to run.
        device: where they are computed.
        slots: K, at least 2 to overlap copies; 1 uses the least memory.
        cache_bytes: GPU memory to keep single experts in.
        copy: copies from a host tensor, the second, in the current stream.

    Attributes:
        statistics: what has been copied.
        timer: times copies and what waits for them, if there is one.
    """

    timer: PassTimer | None = None

    def __init__(
        self,
        stacks: Sequence[Stack],
        device: torch.device,
        slots: int,
        cache_bytes: int = 0,
        copy: Callable[[Tensor, Tensor], None] = copy_async,
    ) -> None:
        self._stacks, self._device, self._copy_host = stacks, device, copy
        self._slots = [
            _Slot(torch.empty(self._room(), dtype=torch.uint8, device=device))
            for _ in range(min(slots, len(stacks)))
        ]
        self._cache = (
            ExpertCache([s.tensors if s.experts else () for s in stacks], device, cache_bytes)
            if cache_bytes
            else None
        )
        self._few = False  # whether the latest pass that told had few tokens
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._successor = {n: (n + 1) % len(stacks) for n in range(len(stacks))}
        self._latest: int | None = None
        self.statistics = RingStatistics()
        self._start()

    @property
    def slot_bytes(self) -> int:
        """Bytes of GPU memory of all slots."""
        return sum(slot.memory.numel() for slot in self._slots)

    @property
    def cache_bytes(self) -> int:
        """Bytes of GPU memory of the cache of single experts."""
        return 0 if self._cache is None else self._cache.bytes

    def acquire(
        self, layer: int, call: RoutedCall | None = None, *, whole: bool = False
    ) -> list[Tensor]:
        """The tensors of a layer's experts on the device, until :meth:`release`.

        The current stream waits for their copy. The host waits only to read which experts few
        tokens have chosen.

        Args:
            layer: its number.
            call: what is computed with them. If it has few tokens, only the experts that it reads
                are sure to be there; see :meth:`holds_all`. None reads all.
            whole: whether all are copied for few tokens, too, since other calls follow before
                :meth:`release`.
        """
        if self._latest is not None:
            self._successor[self._latest] = layer  # the next pass goes the same way
        self._latest = layer
        was_ahead, some = not self._few, self._reads_few(layer, call, whole)
        slot = self._slot_of(layer)
        if slot is None or (slot.experts is not None and not some):
            slot = slot or self._free_slot()
            self.statistics.misses += was_ahead and not some
            self._fill(layer, slot, some)
        elif slot.version != self._stacks[layer].version():
            self._fill(layer, slot, some)
        slot.in_use = True
        if call is not None and slot.experts is not None:
            self._copy_experts(layer, slot, call.experts())
        if slot.filled is not None:
            with nullcontext() if self.timer is None else self.timer.waiting():
                slot.filled.wait(torch.cuda.current_stream(self._device))
        return self._stacks[layer].views(slot.memory)

    def holds_all(self, layer: int) -> bool:
        """Whether all of a layer's experts are there, and not just those that its tokens chose."""
        slot = self._slot_of(layer)
        return slot is not None and slot.experts is None

    def release(self, layer: int) -> None:
        """Lets a layer's slot be filled with the experts of one to come."""
        slot = self._slot_of(layer)
        if slot is None or not slot.in_use:
            return  # its forward pass has failed before it began
        slot.in_use = False
        if self._few:
            return
        for free in self._slots:  # this one, and those that few tokens have left without a layer
            is_free = free is slot or (free.experts is not None and not free.in_use)
            if is_free and (coming := self._next_to_copy(layer)) is not None:
                self._copy(coming, free)

    def close(self) -> None:
        """Waits for the copies under way."""
        if self._stream is not None:
            self._stream.synchronize()
        self._slots.clear()

    def _room(self) -> int:
        """Bytes of a slot."""
        return max(stack.slot_bytes for stack in self._stacks)

    def _start(self) -> None:
        """Starts to copy the first layers."""
        for n, slot in enumerate(self._slots):
            self._copy(n, slot)

    def _reads_few(self, layer: int, call: RoutedCall | None, whole: bool) -> bool:
        """Whether single experts are copied for a call. Takes note of its number of tokens."""
        if whole:
            self._few = False
            return False
        experts = self._stacks[layer].experts
        if call is None or not experts:
            return False
        few = are_few(experts, call.top_k, call.tokens)
        if call.tokens:  # passes without tokens, as of an empty batch, say nothing of others
            self._few = few
        return few

    def _slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _free_slot(self) -> _Slot:
        """One that may be overwritten, at best one without a whole layer."""
        free = [slot for slot in self._slots if not slot.in_use]
        if not free:
            raise ConfigError("Layers whose experts are offloaded can't run inside one another.")
        return min(free, key=lambda slot: slot.experts is None)

    def _next_to_copy(self, layer: int) -> int | None:
        """The first layer after ``layer`` that is in no slot; None if all to come are."""
        present = {s.layer for s in self._slots if s.experts is None or s.in_use} - {layer}
        coming = self._successor[layer]
        for _ in self._stacks:
            if coming == layer:
                return None
            if coming not in present:
                return coming
            coming = self._successor[coming]
        return None

    def _fill(self, layer: int, slot: _Slot, some: bool) -> None:
        """Gives a slot to a layer: with all of its experts, or with none yet."""
        if not some:
            self._copy(layer, slot)
            return
        slot.layer, slot.version, slot.experts = layer, self._stacks[layer].version(), set()

    def _copy(
        self, layer: int, slot: _Slot, transfer: Callable[[Stack, _Slot], None] | None = None
    ) -> None:
        """Starts to copy, after what the current stream still computes with the slot.

        Args:
            layer: whose experts.
            slot: to where.
            transfer: copies, in the stream for that; None is :meth:`_transfer`.
        """
        stack = self._stacks[layer]
        for other in self._slots:
            if other.layer == layer:  # some of its experts
                other.layer = None
        slot.layer, slot.version = None, stack.version()  # nobody's if this is interrupted
        with self._copying(slot), self._timed(sum(map(_bytes, stack.tensors))):
            (transfer or self._transfer)(stack, slot)
        slot.layer, slot.experts = layer, None
        self.statistics.copied += stack.slot_bytes

    def _transfer(self, stack: Stack, slot: _Slot) -> None:
        """Copies in the current stream."""
        for own, host in zip(stack.views(slot.memory), stack.tensors, strict=True):
            self._copy_host(own, host)

    def _copy_experts(self, layer: int, slot: _Slot, experts: Sequence[int]) -> None:
        """Starts to copy those of some experts, ascending, that are not in their places."""
        assert slot.experts is not None
        missing: Sequence[int] = [e for e in experts if e not in slot.experts]
        stack = self._stacks[layer]
        views = stack.views(slot.memory)
        if missing:
            with self._copying(slot):
                missing = self._copy_missing(layer, missing, views)
        if self._cache is not None:
            with torch.cuda.stream(self._stream):  # beside the computation, which only reads
                self._cache.keep(layer, experts, views)
        slot.experts.update(experts)
        self.statistics.expert_hits += len(experts) - len(missing)
        self.statistics.expert_misses += len(missing)

    def _copy_missing(
        self, layer: int, experts: Sequence[int], into: Sequence[Tensor]
    ) -> Sequence[int]:
        """Copies experts from the cache, and those that it returns from the host."""
        stack = self._stacks[layer]
        if self._cache is not None:
            experts = self._cache.load(layer, stack.version(), experts, into)
        if not experts:
            return experts
        size = len(experts) * sum(_bytes(host[0]) for host in stack.tensors)
        with self._timed(size):
            for run in runs(experts):
                for own, host in zip(into, stack.tensors, strict=True):
                    self._copy_host(own[run], host[run])
        self.statistics.copied += size
        return experts

    def _timed(self, size: int) -> AbstractContextManager[None]:
        """Around a copy of ``size`` bytes from the host."""
        return nullcontext() if self.timer is None else self.timer.copying(size)

    @contextmanager
    def _copying(self, slot: _Slot) -> Generator[None, None, None]:
        """Copies into a slot, on their stream, after what the current one computes with it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            slot.filled = torch.cuda.Event()
            slot.filled.record()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
