"""Bytes of a model whose experts are in host memory: there, in slots, and of everything else."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.ops.group_quantization import bits_of
from lightning_fastmoe.planning.compressed import compressed_bytes, compression_scratch

GIGABYTE = 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OffloadSizes:
    """Bytes of a model.

    Attributes:
        experts: of each layer with experts.
        rest: of everything else.
        cache_per_token: of keys and values, over all layers.
        choices: experts of each layer and how many of them a token has, E and K; empty, and K is 0,
            where single experts are not copied.
        compressed: of each layer with experts, if these are compressed; else empty.
        scratch: GPU memory that decompressing takes beside the weights.
        layers: number of layers with keys and values; None if each has experts.
    """

    experts: tuple[int, ...]
    rest: int
    cache_per_token: int = 0
    choices: tuple[tuple[int, int], ...] = ()
    compressed: tuple[int, ...] = ()
    scratch: int = 0
    layers: int | None = None

    def moving(self, resident: int) -> tuple[int, ...]:
        """What is in host memory and copied of each layer whose experts don't stay on the GPU."""
        return (self.compressed or self.experts)[: len(self.experts) - resident]

    def weights_on_gpu(self, slots: int, resident: int, groups: int = 1) -> int:
        """Bytes of everything else, of resident experts and of slots."""
        resident_bytes = sum(self.experts[len(self.experts) - resident :])
        return self.rest + resident_bytes + self.slot_bytes(slots, resident, groups)

    def slot_bytes(self, slots: int, resident: int, groups: int = 1) -> int:
        """Bytes of slots, and of the workspace of one layer's decompressed experts.

        A slot is for a group of a layer's experts: all of them, or fewer.
        """
        moving = self.moving(resident)
        largest = 0
        for layer, size in enumerate(moving):
            number = self.choices[layer][0] if self.choices else groups
            largest = max(largest, size * -(-number // groups) // number)
        total = min(slots, len(moving) * groups) * largest
        if self.compressed and moving:
            total += max(self.experts[: len(moving)]) + self.scratch
        return total

    @classmethod
    def of(
        cls,
        model: nn.Module,
        cache_per_token: int = 0,
        compression: str | None = None,
        layers_with_cache: int | None = None,
    ) -> OffloadSizes:
        """Those of a model, which may be on the meta device.

        Raises:
            ConfigError: if it has no layers with experts, or there is no such compression.
        """
        layers = [layer for _, layer in expert_layers(model)]
        experts = tuple(
            sum(p.numel() * p.element_size() for p in layer.experts.holder.parameters())
            for layer in layers
        )
        if not experts:
            raise ConfigError(f"{type(model).__name__} has no experts that could be offloaded.")
        rest = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(experts)
        compressed: tuple[int, ...] = ()
        scratch = 0
        if compression is not None:
            bits = bits_of(compression)
            compressed = tuple(compressed_bytes(layer, bits) for layer in layers)
            scratch = max(compression_scratch(layer, bits) for layer in layers)
        single = [layer.experts.is_stacked and not compressed for layer in layers]
        choices = tuple(
            (layer.num_experts, (layer.top_k or 0) if is_copied_singly else 0)
            for layer, is_copied_singly in zip(layers, single, strict=True)
        )
        return cls(experts, rest, cache_per_token, choices, compressed, scratch, layers_with_cache)


def parse_bytes(size: str | int) -> int:
    """``"24GB"`` -> 24,000,000,000; a number is itself.

    Raises:
        ConfigError: if it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError(f"{size!r} is not a number of bytes: use one such as '24GB' or '24GiB'.")
    return int(float(found[1]) * unit)
