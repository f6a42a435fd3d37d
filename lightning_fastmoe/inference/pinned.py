"""Host memory that the GPU copies from at the full rate of its link."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

_SMALLEST = 1 << 20
"""Bytes below which a tensor may share its pages with others."""


class PinnedMemory:
    """Registers tensors where they are, for as long as this object is open.

    Registering takes no second copy. Torch's ``pin_memory`` would, and rounds up to powers of two
    (pytorch#95823), which nearly doubles the host memory of some models.

    Args:
        tensors: on the CPU, contiguous.
        what: they are, for the warning.

    Attributes:
        refused: how many bytes could not be registered. They are copied at a fraction of the rate,
            and the host waits for them.
    """

    def __init__(self, tensors: Iterable[Tensor], what: str = "experts") -> None:
        self.refused = 0
        self._what = what
        self._registered: list[int] = []
        try:
            self._register(tensors)
        except BaseException:
            self.close()
            raise

    def _register(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if tensor.is_pinned() or size < _SMALLEST:
                continue
            if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
                self._registered.append(tensor.data_ptr())
            else:
                self.refused += size
        if self.refused:
            with suppress(RuntimeError):  # CUDA reports a failed call again at the next launch
                torch.zeros(1, device="cuda")
            warnings.warn(
                f"{self.refused / 1e9:.1f} GB of {self._what} can't be registered with CUDA"
                " (containers may limit locked memory: ulimit -l). They are copied at a fraction of"
                " the rate.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Unregisters everything. No copy may be under way."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()
