"""Detects changed weights from samples: a few elements of each, different ones each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_fastmoe.zero.state import FlatFragment

_SAMPLES = 64
"""Number of elements of a fragment that are compared in a step."""
_SHIFT = 7919
"""How far the sample moves from step to step: a prime, so that every element gets its turn."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sampler:
    """Picks elements of each fragment of a flat partition."""

    def __init__(self, fragments: Sequence[FlatFragment], index: Mapping[str, int]) -> None:
        counts = [min(_SAMPLES, f.length) for f in fragments]
        self.owners = _repeated([index[f.name] for f in fragments], counts)
        self.offsets = _repeated([f.offset for f in fragments], counts)
        self.lengths = _repeated([f.length for f in fragments], counts)
        steps = [
            i * f.length // n for f, n in zip(fragments, counts, strict=True) for i in range(n)
        ]
        self.steps = torch.tensor(steps, dtype=torch.int64)
        self._turn, self._positions = -1, self.steps

    def sample(self, flat: Tensor, turn: int) -> Tensor:
        """The bits of some elements; the same elements for the same turn."""
        if self.steps.device != flat.device:
            for name in ("offsets", "lengths", "steps"):
                setattr(self, name, getattr(self, name).to(flat.device))
            self._turn = -1
        if self._turn != turn:  # each turn is sampled twice: after a step and before the next
            self._turn = turn
            self._positions = self.offsets + (self.steps + turn * _SHIFT) % self.lengths
        return _bits(flat.detach()[self._positions])

    def owners_of(self, hits: Tensor) -> set[int]:
        """The indices of the parameters that were sampled."""
        return set(self.owners[hits.cpu()].tolist())


def sample_each(tensors: Sequence[Tensor], turn: int) -> list[Tensor]:
    """The bits of some elements of small tensors, grouped by kind."""
    parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        part = flat[turn * _SHIFT % step :: step]
        parts.setdefault((part.dtype, part.device), []).append(part)
    return [_bits(torch.cat(same)) for same in parts.values()]


def _repeated(values: list[int], counts: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64)
    )


def _bits(values: Tensor) -> Tensor:
    """The values as integers, so that NaN compares equal to itself."""
    return values.contiguous().view(_INTEGERS[values.element_size()])


def differ(now: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether any tensor differs; one synchronisation per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for a, b in zip(now, before, strict=True):
        by_device.setdefault(a.device, []).append((a != b).any())
    return any(bool(torch.stack(flags).any()) for flags in by_device.values())
