"""Host memory that the GPU copies from at the full rate of its link."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from operator import itemgetter

import torch
from torch import Tensor

from lightning_fastmoe.inference.bounce import BounceBuffers

_SMALLEST = 1 << 20
"""Bytes below which a tensor may share its pages with others."""


class PinnedMemory:
    """Registers tensors where they are, for as long as this object is open.

    Registering takes no second copy. Torch's ``pin_memory`` would, and rounds up to powers of two
    (pytorch#95823), which nearly doubles the host memory of some models. What can't be registered,
    such as files mapped for reading, goes through :class:`BounceBuffers`, and a warning says so.

    Args:
        tensors: on the CPU, contiguous.
        what: they are, for the warning; None for no warning.
        bounces: whether buffers are made for what can't be registered, two of 32 MiB; only for
            memory that no GPU writes to, since the host reads it when :meth:`copy` is called.

    Attributes:
        refused: how many bytes could not be registered.
    """

    def __init__(
        self, tensors: Iterable[Tensor], what: str | None = "experts", *, bounces: bool = True
    ) -> None:
        self.refused = 0
        self._what, self._bounces = what, bounces
        self._registered: list[int] = []
        self._refused: list[tuple[int, int]] = []  # ascending and apart
        self._bounce: BounceBuffers | None = None
        try:
            self._register(tensors)
        except BaseException:
            self.close()
            raise

    def copy(self, into: Tensor, host: Tensor) -> None:
        """Copies in the current stream, without waiting where ``host`` is registered.

        Args:
            into: on the GPU, contiguous.
            host: of its shape and dtype: one of the tensors, a part, or what contains some.
        """
        if self._bounce is not None:
            begin = host.data_ptr()
            end = begin + host.numel() * host.element_size()
            after = bisect_left(self._refused, end, key=itemgetter(0))
            if after and self._refused[after - 1][1] > begin:
                self._bounce.copy(into, host)
                return
        copy_async(into, host)

    def _register(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if tensor.is_pinned() or size < _SMALLEST:
                continue
            start = tensor.data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(start, size, 0)) == 0:
                self._registered.append(start)
            else:
                self.refused += size
                self._refused.append((start, start + size))
        self._refused.sort()
        if self.refused:
            with suppress(RuntimeError):  # CUDA reports a failed call again at the next launch
                torch.zeros(1, device="cuda")
            if self._bounces:
                with suppress(RuntimeError):
                    self._bounce = BounceBuffers(torch.device("cuda"))
            if self._what is None:
                return
            how = "through pinned buffers, by the host's cores"
            warnings.warn(
                f"{self.refused / 1e9:.1f} GB of {self._what} can't be registered with CUDA"
                " (containers may limit locked memory: ulimit -l; files may be mapped for reading)."
                f" They are copied {how if self._bounce else 'at a fraction of the rate'}.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Unregisters everything. No copy may be under way."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()
        self._refused.clear()
        self._bounce = None


def copy_async(into: Tensor, host: Tensor) -> None:
    """Copies in the current stream, from pinned memory without waiting."""
    into.copy_(host, non_blocking=True)
