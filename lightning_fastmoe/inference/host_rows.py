"""Keys and values of layers and chunks in host memory, which visit the GPU one at a time.

While a chunk of a layer computes, the keys and values of the next one are copied into a staging
buffer; new positions are copied back behind the computation. FlexGen (Sheng et al. 2023, arXiv
2303.06865) keeps its cache on the host this way.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.pinned import PinnedMemory

_ALIGNMENT = 256
_CONTIGUOUS = torch.contiguous_format

Key = tuple[int, int]
"""A layer and a chunk."""


@dataclass
class _Held:
    """Keys and values of a layer's chunk: positions first, so that a range of them is contiguous.

    Attributes:
        keys: (max_length, n, H, width) on the host.
        values: the same; the width may be another.
        pinned: registers both with CUDA; None on the CPU.
        written: recorded when the latest positions have been copied to the host.
    """

    keys: Tensor
    values: Tensor
    pinned: PinnedMemory | None = None
    written: Any = None

    def bytes_of(self, positions: int) -> int:
        return sum(t[:positions].numel() * t.element_size() for t in (self.keys, self.values))


@dataclass
class HostRowsStatistics:
    """What has been copied.

    Attributes:
        copied: bytes copied to the GPU.
        written: bytes copied to the host.
        misses: chunks of layers whose copy had not been started before they were needed.
    """

    copied: int = 0
    written: int = 0
    misses: int = 0


@dataclass
class _Staged:
    """What the staging buffer holds, or will once its copy is done."""

    key: Key
    span: tuple[int, int]
    tensors: tuple[Tensor, Tensor]
    filled: Any = None


@dataclass(eq=False)
class HostRows:
    """Keys and values of all layers and chunks, as long as ``max_length`` positions.

    On the GPU there are one chunk's keys and values of one layer, in a staging buffer; what a chunk
    computes with is a copy of them and of its new positions.

    Args:
        max_length: positions of a sequence that there is room for.

    Attributes:
        statistics: what has been copied.
    """

    max_length: int
    statistics: HostRowsStatistics = field(default_factory=HostRowsStatistics)
    _held: dict[Key, _Held] = field(default_factory=dict)
    _largest: int = 0  # bytes of a layer's chunk
    _staging: Tensor | None = None
    _staged: _Staged | None = None
    _streams: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Registered memory must not be freed; and a finalizer runs before attributes go.
        weakref.finalize(self, _let_go, self._streams, self._held)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(held.bytes_of(self.max_length) for held in self._held.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffer on the GPU."""
        return 0 if self._staging is None else self._staging.numel()

    def past(self, key: Key, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions ``start`` to ``stop``, (n, H, stop - start, width).

        They are there until :meth:`stage` is called.
        """
        if self._staged is None or (self._staged.key, self._staged.span) != (key, (start, stop)):
            self.statistics.misses += 1
            self.stage(key, start, stop)
        staged, self._staged = self._staged, None
        assert staged is not None
        if staged.filled is not None:
            staged.filled.wait(torch.cuda.current_stream(staged.tensors[0].device))
        keys, values = (tensor.permute(1, 2, 0, 3) for tensor in staged.tensors)
        return keys, values

    def stage(self, key: Key, start: int, stop: int) -> None:
        """Starts to copy positions to the GPU, after what the current stream does with others."""
        held = self._held[key]
        buffer = self._buffer()
        halves, at = [], 0
        for host in (held.keys, held.values):
            part = host[start:stop]
            size = part.numel() * part.element_size()
            halves.append(buffer[at : at + size].view(part.dtype).view(part.shape))
            at += _aligned(size)
        staged = _Staged(key, (start, stop), (halves[0], halves[1]))
        stream = self._streams[0] if self._streams else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            if held.written is not None:
                held.written.wait(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for own, host in zip(halves, (held.keys, held.values), strict=True):
                own.copy_(host[start:stop], non_blocking=True)
            if stream is not None:
                staged.filled = torch.cuda.Event()
                staged.filled.record()
        self.statistics.copied += held.bytes_of(stop) - held.bytes_of(start)
        self._staged = staged

    def write(self, key: Key, at: int, keys: Tensor, values: Tensor) -> None:
        """Appends positions to a layer's chunk.

        Args:
            key: the layer and the chunk.
            at: positions that it has.
            keys: (n, H, positions, width).
            values: the same; the width may be another.

        Raises:
            ConfigError: if there are more than ``max_length`` then, or shapes have changed.
        """
        stop = at + keys.shape[-2]
        if stop > self.max_length:
            raise ConfigError(
                f"A sequence has {stop} positions, and HostCache has room for"
                f" max_length={self.max_length}: make that the prompt's length and the tokens to"
                " generate."
            )
        held = self._held.get(key)
        if held is None or (at == 0 and not _continues(held, keys, values)):
            if held is not None:  # of another batch
                _let_go(self._streams, {key: held})
            held = self._held[key] = self._allocate(keys, values)
        if not _continues(held, keys, values):
            raise ConfigError(
                f"Keys {tuple(keys.shape)} and values {tuple(values.shape)} don't continue those"
                f" that HostCache has, {tuple(held.keys.shape[1:])} sequences, heads and width: use"
                " a new one for another batch."
            )
        if not self._streams:
            held.keys[at:stop].copy_(keys.permute(2, 0, 1, 3))
            held.values[at:stop].copy_(values.permute(2, 0, 1, 3))
        else:
            self._write_behind(held, at, stop, keys, values)
        self.statistics.written += held.bytes_of(stop) - held.bytes_of(at)

    def _write_behind(self, held: _Held, at: int, stop: int, keys: Tensor, values: Tensor) -> None:
        """Copies to the host while the current stream computes.

        The host runs far ahead of the GPU. If keys and values were kept until they are copied,
        those of a whole pass would be. So the current stream waits until they are in a buffer, and
        the next ones get its memory once these are on the host.
        """
        both = (keys, values)
        current, stream = torch.cuda.current_stream(self._device), self._streams[1]
        stream.wait_stream(current)
        taken, held.written = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            # Cloned, as those of one position are contiguous already.
            rows = [torch.clone(new.permute(2, 0, 1, 3), memory_format=_CONTIGUOUS) for new in both]
            taken.record()
            for host, new in zip((held.keys, held.values), rows, strict=True):
                host[at:stop].copy_(new, non_blocking=True)
            held.written.record()
        taken.wait(current)

    def forget(self) -> None:
        """What is staged is old."""
        self._staged = None

    @property
    def _device(self) -> Any:
        return self._streams[0].device if self._streams else torch.device("cpu")

    def _allocate(self, keys: Tensor, values: Tensor) -> _Held:
        if keys.device.type == "cuda" and not self._streams:
            self._streams += [torch.cuda.Stream(keys.device) for _ in range(2)]
        shapes = [(self.max_length, *new.shape[:2], new.shape[3]) for new in (keys, values)]
        sizes = [_aligned(math.prod(shape) * keys.element_size()) for shape in shapes]
        memory = _whole_pages(sum(sizes))
        self._largest = max(self._largest, len(memory))
        tensors = [
            part[: math.prod(shape) * keys.element_size()].view(keys.dtype).view(shape)
            for part, shape in zip(memory.split(sizes), shapes, strict=True)
        ]
        on_gpu = keys.device.type == "cuda"
        pinned = PinnedMemory([memory], "keys and values", bounces=False) if on_gpu else None
        return _Held(tensors[0], tensors[1], pinned)

    def _buffer(self) -> Tensor:
        if self._staging is None or self._staging.numel() < self._largest:
            if self._streams:
                self._streams[0].synchronize()
            with torch.inference_mode(False):
                self._staging = torch.empty(self._largest, dtype=torch.uint8, device=self._device)
        return self._staging


def _whole_pages(size: int) -> Tensor:
    """Host memory of its own pages: those of two tensors can't be registered twice.

    It begins where its storage does, which is where torch looks for whether it is pinned.
    """
    with torch.inference_mode(False):  # later passes may not be in inference mode
        return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _continues(held: _Held, keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values are of the sequences, heads, widths and dtypes of those held."""
    return all(
        (new.shape[0], new.shape[1], new.shape[3], new.dtype) == (*host.shape[1:], host.dtype)
        for new, host in ((keys, held.keys), (values, held.values))
    )


def _let_go(streams: list[Any], held: dict[Key, _Held]) -> None:
    for stream in streams:
        stream.synchronize()
    for one in held.values():
        if one.pinned is not None:
            one.pinned.close()
    held.clear()
