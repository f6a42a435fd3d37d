"""Single experts that stay on the GPU because they were chosen lately.

Tokens that follow one another often choose the same experts (Eliseev and Mazur 2023, arXiv
2312.17238, keep the least recently used ones out, as here). Each layer has its own rows: a pass
uses all layers in turn, so in rows for all of them each would evict what the next pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError


class ExpertCache:
    """Rows of GPU memory for the experts of each layer that were used last.

    Reads and writes are enqueued on the current stream, which must be the same one each time.

    Args:
        layers: the tensors of each layer's experts, on the CPU, each (E, ...); none of layers that
            take no part.
        device: where the rows are.
        size: bytes that they may take.

    Raises:
        ConfigError: if there is no layer that takes part, or no room for one expert.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], device: torch.device, size: int) -> None:
        rows = _rows_of(layers, size)
        shapes = [
            [(tensor.dtype, (n, *tensor.shape[1:])) for tensor in tensors]
            for tensors, n in zip(layers, rows, strict=True)
        ]
        # One piece: an allocation of its own for each tensor would take up to 2 MiB more.
        self._memory = torch.empty(
            sum(_aligned(*each) for layer in shapes for each in layer),
            dtype=torch.uint8,
            device=device,
        )
        self._layers, at = [], 0
        for layer, n in zip(shapes, rows, strict=True):
            views = []
            for dtype, shape in layer:
                size = math.prod(shape) * dtype.itemsize
                views.append(self._memory[at : at + size].view(dtype).view(shape))
                at += _aligned(dtype, shape)
            self._layers.append(_Rows(views, n))

    @property
    def bytes(self) -> int:
        """GPU memory that it takes: what was asked for, or less, but for alignment."""
        return self._memory.numel()

    def load(
        self, layer: int, version: object, experts: Sequence[int], into: Sequence[Tensor]
    ) -> list[int]:
        """Copies those of a layer's experts that are here.

        Args:
            layer: its number.
            version: of its weights; what was kept of another one is forgotten.
            experts: distinct ones.
            into: tensors (E, ...), which get them in their places.

        Returns:
            The experts that are not here.
        """
        rows = self._layers[layer]
        if rows.version != version:
            rows.forget(version)
        missing = []
        for expert in experts:
            row = rows.of.get(expert)
            if row is None:
                missing.append(expert)
                continue
            for own, there in zip(rows.memory, into, strict=True):
                there[expert].copy_(own[row], non_blocking=True)
        return missing

    def keep(self, layer: int, used: Sequence[int], source: Sequence[Tensor]) -> None:
        """Keeps the experts of a layer that a pass has used, in place of those used longest ago.

        Args:
            layer: its number, after :meth:`load` in the same pass.
            used: the distinct experts that the pass uses.
            source: tensors (E, ...) that have them in their places.
        """
        rows = self._layers[layer]
        for expert in used:  # they are the last that may go
            if expert in rows.of:
                rows.of[expert] = rows.of.pop(expert)
        needed = set(used)
        for expert in used:
            if expert in rows.of:
                continue
            row = rows.take(needed)
            if row is None:
                return
            for own, there in zip(rows.memory, source, strict=True):
                own[row].copy_(there[expert], non_blocking=True)
            rows.of[expert] = row


class _Rows:
    """What a layer has in the cache.

    Attributes:
        memory: for each of its tensors (rows, ...).
        of: expert -> its row, the one used longest ago first.
        version: of the weights that they are copies of.
    """

    def __init__(self, memory: Sequence[Tensor], rows: int) -> None:
        self.memory, self.rows = memory, rows
        self.of: dict[int, int] = {}
        self.version: object = None

    def forget(self, version: object) -> None:
        """Empties them for another version."""
        self.of.clear()
        self.version = version

    def take(self, needed: set[int]) -> int | None:
        """A row for another expert; None if all are for ``needed`` ones."""
        if free := set(range(self.rows)) - set(self.of.values()):
            return min(free)
        oldest = next((expert for expert in self.of if expert not in needed), None)
        return None if oldest is None else self.of.pop(oldest)


def runs(experts: Sequence[int]) -> Iterator[slice]:
    """Intervals of ascending experts, each of which is one copy."""
    start = 0
    for i in range(1, len(experts) + 1):
        if i == len(experts) or experts[i] != experts[i - 1] + 1:
            yield slice(experts[start], experts[i - 1] + 1)
            start = i


def _rows_of(layers: Sequence[Sequence[Tensor]], size: int) -> list[int]:
    """How many experts each layer may keep: equal bytes, and one more while there is room."""
    taking_part = [tensors for tensors in layers if tensors]
    if not taking_part:
        raise ConfigError(
            f"expert_cache={size}: no layer copies single experts, because theirs are modules, or"
            " all of them are used by any token. Leave it out."
        )
    each = size // len(taking_part)
    rows = [min(len(t[0]), each // _bytes_of_one(t)) if t else 0 for t in layers]
    room = size - sum(n * _bytes_of_one(t) for n, t in zip(rows, layers, strict=True))
    for i, tensors in enumerate(layers):
        if tensors and rows[i] < len(tensors[0]) and _bytes_of_one(tensors) <= room:
            rows[i] += 1
            room -= _bytes_of_one(tensors)
    if not any(rows):
        smallest = min(map(_bytes_of_one, taking_part))
        raise ConfigError(
            f"expert_cache={size} bytes has no room for one expert, which takes {smallest}: use at"
            f" least {smallest * len(taking_part)}, one for each layer."
        )
    return rows


def _aligned(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, so that the next one begins at a multiple of 256."""
    return -(-math.prod(shape) * dtype.itemsize // 256) * 256


def _bytes_of_one(tensors: Sequence[Tensor]) -> int:
    return sum(tensor[0].nbytes for tensor in tensors)
