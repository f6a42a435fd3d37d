"""Experts that lie once in the memory of a host, for all of its processes.

One process creates a file that exists in memory alone (``memfd_create``), so that neither the size
of /dev/shm limits it nor a crash leaves it behind, and puts the experts there; others map it in the
place of their own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.ring import Stack

_ALIGNMENT = 4096

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Of the tensors of a layer, and their dtypes."""


@dataclass(frozen=True)
class Shared:
    """Where experts are; another process of this host finds them by it.

    Attributes:
        path: of the file, in /proc.
        inode: of the file, which nobody else's has.
        bytes: of the file.
        regions: (begin, bytes) of each layer.
        layers: shapes and dtypes of each layer.
    """

    path: str
    inode: int
    bytes: int
    regions: tuple[tuple[int, int], ...]
    layers: tuple[Shapes, ...]


class SharedExperts:
    """Parameters of layers, in memory that several processes have.

    While they are in use every process sees what another one writes. After :meth:`part` each keeps
    them, still without a copy, but what it writes is its own.

    Args:
        layers: parameters of each layer, contiguous and on the CPU.
        shares: into so many equal parts a layer must be divisible.
        shared: where the creator's are; None creates them, from these parameters.

    Attributes:
        layers: the parameters.
        shared: for the other processes.
        regions: (B,) uint8 of each layer, laid out as in a slot of a ring; ``shares`` divides B.
        memory: (B,) uint8, all of it.

    Raises:
        ConfigError: if the layers are not the creator's, or the system has no such memory.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Parameter]],
        shares: int,
        shared: Shared | None = None,
    ) -> None:
        self.layers = layers
        shapes = tuple(tuple((tuple(p.shape), str(p.dtype)) for p in layer) for layer in layers)
        if shared is not None and shared.layers != shapes:
            raise ConfigError(
                "This process has built other experts than the first one: each process must build"
                f" the same model. Here they are {_first_other(shapes, shared.layers)}."
            )
        # For the layout alone: what a process gives up must not be kept.
        stacks = [Stack([torch.empty_like(p, device="meta") for p in layer]) for layer in layers]
        self._file = _open(stacks, shares, shapes) if shared is None else _attach(shared)
        self.shared = self._file.shared
        self.memory = self._file.map(mmap.MAP_SHARED)
        self.regions = [self.memory[at : at + size] for at, size in self.shared.regions]
        for layer, stack, region in zip(layers, stacks, self.regions, strict=True):
            for parameter, view in zip(layer, stack.views(region), strict=True):
                if shared is None:
                    view.copy_(parameter.data)
                parameter.data = view  # which frees what was there, a layer at a time

    def holds(self, layers: Sequence[Sequence[nn.Parameter]]) -> bool:
        """Whether these parameters are the ones in this memory."""
        inside = range(self.memory.data_ptr(), self.memory.data_ptr() + self.memory.numel())
        return [[id(p) for p in layer] for layer in layers] == [
            [id(p) for p in layer] for layer in self.layers
        ] and all(p.data_ptr() in inside for layer in layers for p in layer)

    def part(self) -> None:
        """From now on what this process writes to the parameters is its own."""
        own = self._file.map(mmap.MAP_PRIVATE)
        first = self.memory.data_ptr()
        inside = range(first, first + self.memory.numel())
        for layer in self.layers:
            for parameter in layer:
                if (at := parameter.data_ptr()) in inside:  # else it has been given other memory
                    size = parameter.numel() * parameter.element_size()
                    bytes_ = own[at - first : at - first + size]
                    parameter.data = bytes_.view(parameter.dtype).view(parameter.shape)
        self._file.close()
        self.regions, self.memory = [], own[:0]


class _File:
    """A file in memory, and its descriptor here."""

    def __init__(self, descriptor: int, shared: Shared) -> None:
        self._descriptor, self.shared = descriptor, shared

    def map(self, flags: int) -> Tensor:
        """All of it as ``(B,)`` uint8, for as long as the tensor or a view of it exists."""
        mapped = mmap.mmap(
            self._descriptor, self.shared.bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE
        )
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def close(self) -> None:
        """Forgets the descriptor; what is mapped stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def _open(stacks: Sequence[Stack], shares: int, shapes: tuple[Shapes, ...]) -> _File:
    create: Any = getattr(os, "memfd_create", None)
    if create is None:
        raise ConfigError("Several processes share experts by memfd_create, which needs Linux.")
    regions, end = [], 0
    for stack in stacks:
        size = shares * _up(-(-stack.slot_bytes // shares), 256)
        regions.append((end, size))
        end = _up(end + size, _ALIGNMENT)
    descriptor = create("lightning_fastmoe_experts")
    os.ftruncate(descriptor, end)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    inode = os.fstat(descriptor).st_ino
    return _File(descriptor, Shared(path, inode, end, tuple(regions), shapes))


def _attach(shared: Shared) -> _File:
    try:
        descriptor = os.open(shared.path, os.O_RDWR)
    except OSError as error:
        raise ConfigError(
            f"The experts of the first process can't be mapped from {shared.path}: {error}. All"
            " processes must run on one host, as one user, and see each other in /proc."
        ) from error
    file = _File(descriptor, shared)
    if os.fstat(descriptor).st_ino != shared.inode:
        raise ConfigError(
            f"{shared.path} is another process's here: all processes must run on one host, and in"
            " one container."
        )
    return file


def _first_other(own: tuple[Shapes, ...], others: tuple[Shapes, ...]) -> str:
    if len(own) != len(others):
        return f"of {len(own)} layers, there of {len(others)}"
    number = next(n for n, (a, b) in enumerate(zip(own, others, strict=True)) if a != b)
    return f"{own[number]} in layer {number}, there {others[number]}"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
