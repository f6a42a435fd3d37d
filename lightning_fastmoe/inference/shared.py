"""Experts that lie once in the memory of a host, for all of its processes.

One process creates a file that exists in memory alone (``memfd_create``), so that neither the size
of /dev/shm limits it nor a crash leaves it behind, and puts the experts there; others map it in the
place of their own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
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
        memory: (B,) uint8, all of it; empty after :meth:`part`.
        regions: (B,) uint8 of each layer, laid out as in a slot of a ring; ``shares`` divides B.

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
        self._stacks = [Stack([torch.empty_like(p, device="meta") for p in x]) for x in layers]
        self._file = _open(self._stacks, shares, shapes) if shared is None else _attach(shared)
        self.shared = self._file.shared
        self._left: list[tuple[int, int]] = []
        self._map(fill=shared is None)

    def _map(self, *, fill: bool = False) -> None:
        """Puts the parameters there, a layer at a time; with ``fill``, what they are, too."""
        self.memory = self._file.map(mmap.MAP_SHARED)
        self.regions = self._regions(self.memory)
        for parameter, view in self._views(self.regions):
            if fill:
                view.copy_(parameter.data)
            parameter.data = view

    def holds(self, layers: Sequence[Sequence[nn.Parameter]]) -> bool:
        """Whether these parameters are in this memory, and in use."""
        return (
            bool(self.regions)
            and self._are(layers)
            and all(p.data_ptr() == view.data_ptr() for p, view in self._views(self.regions))
        )

    def part(self) -> None:
        """From now on what this process writes to the parameters is its own."""
        shared = {p: view.data_ptr() for p, view in self._views(self.regions)}
        for parameter, view in self._views(self._regions(self._file.map(mmap.MAP_PRIVATE))):
            if parameter.data_ptr() == shared[parameter]:  # else it has been given other memory
                parameter.data = view
        self._left = self._state()
        self.regions, self.memory = [], self.memory.new_empty(0)

    def resume(self, layers: Sequence[Sequence[nn.Parameter]], *, changed: bool) -> bool:
        """Shares the parameters again, after :meth:`part`, without a copy.

        Args:
            layers: must be the same.
            changed: whether they may have been changed, which is then lost.

        Returns:
            Whether it did.
        """
        if not self._are(layers) or self.regions or not (changed or self._state() == self._left):
            return False
        self._map()
        return True

    def _are(self, layers: Sequence[Sequence[nn.Parameter]]) -> bool:
        own, others = ([[id(p) for p in x] for x in found] for found in (self.layers, layers))
        return own == others and all(
            p.dtype == like.dtype and p.shape == like.shape
            for layer, stack in zip(layers, self._stacks, strict=True)
            for p, like in zip(layer, stack.tensors, strict=True)
        )

    def _state(self) -> list[tuple[int, int]]:
        """Another one once a parameter has been changed."""
        return [
            (p.data_ptr(), -1 if p.is_inference() else p._version) for x in self.layers for p in x
        ]

    def _regions(self, memory: Tensor) -> list[Tensor]:
        return [memory[at : at + size] for at, size in self.shared.regions]

    def _views(self, regions: Sequence[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the tensor in a layer's region that is to be it."""
        for layer, stack, region in zip(self.layers, self._stacks, regions, strict=True):
            yield from zip(layer, stack.views(region), strict=True)


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

    def __del__(self) -> None:
        os.close(self._descriptor)  # what is mapped stays


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
