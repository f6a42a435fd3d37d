"""Predicts how long a pass takes whose experts are copied from host memory, and what limits it.

Copies run beside computation, from one pass into the next. So a pass takes the longer of the two:
copying all experts that don't stay on the GPU, or computing all layers and what surrounds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers

GIGABYTE = 10**9
_MORE = 8 * GIGABYTE
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OffloadSizes:
    """Bytes of a model.

    Attributes:
        experts: of each layer with experts.
        rest: of everything else.
        cache_per_token: of keys and values, over all layers.
    """

    experts: tuple[int, ...]
    rest: int
    cache_per_token: int = 0

    def weights_on_gpu(self, slots: int, resident: int) -> int:
        """Bytes of everything else, of resident experts and of slots."""
        cut = len(self.experts) - resident
        moving = self.experts[:cut]
        ring = min(slots, cut) * max(moving, default=0)
        return self.rest + sum(self.experts[cut:]) + ring

    @classmethod
    def of(cls, model: nn.Module, cache_per_token: int = 0) -> OffloadSizes:
        """Those of a model, which may be on the meta device.

        Raises:
            ConfigError: if it has no layers with experts.
        """
        experts = tuple(
            sum(p.numel() * p.element_size() for p in layer.experts.holder.parameters())
            for _, layer in expert_layers(model)
        )
        if not experts:
            raise ConfigError(f"{type(model).__name__} has no experts that could be offloaded.")
        every = sum(p.numel() * p.element_size() for p in model.parameters())
        return cls(experts, every - sum(experts), cache_per_token)


@dataclass(frozen=True)
class OffloadCosts:
    """What a pass costs on a machine.

    Attributes:
        link: bytes per second from registered host memory.
        layers: seconds that all layers compute in a pass.
        rest: seconds of what surrounds them.
        activations: bytes of GPU memory that a pass needs beside weights.
        step: seconds that one step of generation computes.
        is_measured: whether they were measured on this machine.
        peers: bytes per second that a GPU receives from the others of its host; assumed of NVLink
            between H100s.
    """

    link: float
    layers: float
    rest: float
    activations: int
    step: float = 0.0
    is_measured: bool = False
    peers: float = 300e9


@dataclass(frozen=True)
class OffloadPlan:
    """A pass with experts in host memory.

    Attributes:
        sizes: of the model.
        costs: of the machine.
        tokens: of a pass.
        sequences: of a pass.
        gpu_memory: bytes that may be used.
        slots: layers whose experts have room on the GPU at a time.
        resident: layers whose experts stay there.
        generated: tokens that are generated for each sequence after the pass.
        gpus: how many share the copies, each with a pass of its own.
    """

    sizes: OffloadSizes
    costs: OffloadCosts
    tokens: int
    sequences: int
    gpu_memory: int
    slots: int = 2
    resident: int = 0
    generated: int = 0
    gpus: int = 1

    @property
    def copied(self) -> int:
        """Bytes that a pass copies: none if all layers have a slot, which then keeps them."""
        return 0 if self.slots >= self._cut else sum(self.sizes.experts[: self._cut])

    @property
    def slot_bytes(self) -> int:
        """GPU memory of all slots."""
        moving = self.sizes.experts[: self._cut]
        return min(self.slots, len(moving)) * max(moving, default=0)

    @property
    def resident_bytes(self) -> int:
        """GPU memory of resident experts."""
        return sum(self.sizes.experts[self._cut :])

    @property
    def cache_bytes(self) -> int:
        """GPU memory of keys and values, if tokens are generated."""
        if not self.generated:
            return 0
        return self.sizes.cache_per_token * (self.tokens + self.sequences * self.generated)

    @property
    def on_gpu(self) -> int:
        """GPU memory of everything."""
        weights = self.sizes.weights_on_gpu(self.slots, self.resident)
        return weights + self.cache_bytes + self.costs.activations

    @property
    def copying(self) -> float:
        """Seconds of a pass's copies: of a part over each link, while others come from peers."""
        received = self.copied * (self.gpus - 1) / self.gpus
        return max(self.copied / (self.gpus * self.costs.link), received / self.costs.peers)

    @property
    def computing(self) -> float:
        """Seconds of a pass's computation."""
        return self.costs.layers + self.costs.rest

    @property
    def seconds(self) -> float:
        """Of a pass."""
        return max(self.copying, self.computing)

    @property
    def limit(self) -> str:
        """What a pass waits for."""
        return "the link" if self.copying > self.computing else "the GPU"

    @property
    def hiding_tokens(self) -> int:
        """Tokens of a pass from which copies cost nothing."""
        return round(self.tokens * self.copying / self.computing)

    @property
    def generating(self) -> float:
        """Seconds of all steps of generation."""
        return self.generated * max(self.copying, self.costs.step)

    def with_more_memory(self) -> OffloadPlan:
        """With as many more resident layers as fit into 8 GB."""
        room = _MORE
        resident = self.resident
        while resident < len(self.sizes.experts):
            room -= self.sizes.experts[-1 - resident]
            if room < 0:
                break
            resident += 1
        return replace(self, resident=resident, gpu_memory=self.gpu_memory + _MORE)

    def check(self, host_memory: int | None) -> None:
        """Refuses a plan that doesn't fit.

        Args:
            host_memory: bytes that there are; None if nobody knows.

        Raises:
            ConfigError: with the missing bytes.
        """
        if (missing := self.on_gpu - self.gpu_memory) > 0:
            raise ConfigError(
                f"The GPU lacks {_gb(missing)}: a pass of {self.tokens:,} tokens needs"
                f" {_gb(self.on_gpu)}, and there are {_gb(self.gpu_memory)}. Use fewer tokens per"
                " pass, slots or resident layers."
            )
        held = sum(self.sizes.experts)
        if host_memory is not None and held > host_memory:
            raise ConfigError(
                f"The host lacks {_gb(held - host_memory)}: the experts take {_gb(held)}, and there"
                f" are {_gb(host_memory)} (--host-memory)."
            )

    def text(self) -> str:
        """The plan for people."""
        sizes, costs = self.sizes, self.costs
        known = "measured here" if costs.is_measured else "assumed; --measure measures them"
        each = f" on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        lines = [
            f"{len(sizes.experts)} layers with {_gb(sum(sizes.experts))} of experts;"
            f" {_gb(sizes.rest)} of everything else",
            f"host   {_gb(sum(sizes.experts)):>9}  experts",
            f"GPU    {_gb(self.on_gpu):>9}  of {_gb(self.gpu_memory)}: {_gb(sizes.rest)} model,"
            f" {_gb(self.slot_bytes)} in {self.slots} slots, {_gb(self.resident_bytes)} resident,"
            f" {_gb(costs.activations)} activations"
            + (f", {_gb(self.cache_bytes)} keys and values" if self.generated else ""),
            f"pass   {self.seconds:8.2f} s  {self.tokens:,} tokens{each},"
            f" {self.gpus * self.tokens / self.seconds:,.0f} tokens/s; it waits for {self.limit}",
            f"       copies {self.copying:.2f} s at {costs.link / GIGABYTE:.1f} GB/s{each},"
            f" computation {self.computing:.2f} s ({known})",
            f"       copies cost nothing from {self.hiding_tokens:,} tokens per pass",
        ]
        if self.generated:
            total = self.sequences * self.generated
            lines.append(
                f"then   {self.generating:8.2f} s  {self.generated} tokens for each of"
                f" {self.sequences:,} sequences, {total / self.generating:,.0f} tokens/s"
            )
        more = self.with_more_memory()
        lines.append(
            f"8 GB more: {more.resident} resident layers, a pass of {more.seconds:.2f} s"
            + (f", generation of {more.generating:.2f} s" if self.generated else "")
        )
        return "\n".join(lines) + "\n"

    @property
    def _cut(self) -> int:
        return len(self.sizes.experts) - self.resident


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


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:.1f} GB"
