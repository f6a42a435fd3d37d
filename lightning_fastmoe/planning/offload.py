"""Predicts how long a pass takes whose experts are copied from host memory, and what limits it.

Copies run beside computation, from one pass into the next. So a pass takes the longer of the two:
copying all experts that don't stay on the GPU, or computing all layers and what surrounds them. A
step of generation for few sequences copies the experts that its tokens are expected to choose, once
their router has run: then it computes after it copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.few_tokens import are_few, expected_experts
from lightning_fastmoe.planning.offload_sizes import GIGABYTE, OffloadSizes
from lightning_fastmoe.planning.offload_sizes import gigabytes as _gb

_MORE = 8 * GIGABYTE


@dataclass(frozen=True)
class OffloadCosts:
    """What a pass costs on a machine.

    Attributes:
        link: bytes per second from registered host memory.
        layers: seconds that all layers compute in a pass.
        rest: seconds of what surrounds them.
        activations: bytes of GPU memory that a pass needs beside weights.
        step: seconds that one step of generation computes.
        decompression: bytes per second of decompressed experts.
        is_measured: whether they were measured on this machine.
    """

    link: float
    layers: float
    rest: float
    activations: int
    step: float = 0.0
    decompression: float = 1.5e12
    is_measured: bool = False


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
        expert_cache: bytes for experts that were used last.
        groups: of a layer's experts, of which a slot holds one.
    """

    sizes: OffloadSizes
    costs: OffloadCosts
    tokens: int
    sequences: int
    gpu_memory: int
    slots: int = 2
    resident: int = 0
    generated: int = 0
    expert_cache: int = 0
    groups: int = 1

    @property
    def copied(self) -> int:
        """Bytes that a pass copies."""
        return sum(self.sizes.moving(self.resident))

    @property
    def slot_bytes(self) -> int:
        """GPU memory of all slots."""
        return self.sizes.slot_bytes(self.slots, self.resident, self.groups)

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
        weights = self.sizes.weights_on_gpu(self.slots, self.resident, self.groups)
        return weights + self.expert_cache + self.cache_bytes + self.costs.activations

    @property
    def copying(self) -> float:
        """Seconds of a pass's copies."""
        return self.copied / self.costs.link

    @property
    def computing(self) -> float:
        """Seconds of a pass's computation."""
        return self.costs.layers + self.costs.rest + self.decompressing

    @property
    def decompressing(self) -> float:
        """Seconds of a pass in which the GPU decompresses experts."""
        if not self.sizes.compressed:
            return 0.0
        return sum(self.sizes.experts[: self._cut]) / self.costs.decompression

    @property
    def host_bytes(self) -> int:
        """Host memory of experts."""
        return sum(self.sizes.moving(self.resident)) + self.resident_bytes

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
        computing = self.computing - self.decompressing  # which doesn't grow with tokens
        return round(self.tokens * max(0.0, self.copying - self.decompressing) / computing)

    @property
    def generating(self) -> float:
        """Seconds of all steps of generation."""
        copying = self.copied_by_step / self.costs.link
        computing = self.costs.step + self.decompressing
        after = any(self._chosen(layer) for layer in range(self._cut))
        return self.generated * (copying + computing if after else max(copying, computing))

    @property
    def copied_by_step(self) -> float:
        """Bytes that a step of generation copies.

        With a cache, those that even choices don't find there; real ones repeat more often.
        """
        total = 0.0
        cached = min(1.0, self.expert_cache / self.copied) if self.copied else 0.0
        for layer, size in enumerate(self.sizes.moving(self.resident)):
            chosen = self._chosen(layer)
            total += size if chosen is None else size * chosen[0] / chosen[1] * (1 - cached)
        return total

    def _chosen(self, layer: int) -> tuple[float, int] | None:
        """The experts that a step is expected to choose of a layer, of E; None if all are copied.

        Args:
            layer: its number.
        """
        experts, top_k = self.sizes.choices[layer] if self.sizes.choices else (0, 0)
        if not top_k or not are_few(experts, top_k, self.sequences):
            return None
        return expected_experts(experts, top_k, self.sequences), experts

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

    def check(self, host_memory: int) -> None:
        """Refuses a plan that doesn't fit.

        Args:
            host_memory: bytes that there are.

        Raises:
            ConfigError: with the missing bytes.
        """
        if (missing := self.on_gpu - self.gpu_memory) > 0:
            raise ConfigError(
                f"The GPU lacks {_gb(missing)}: a pass of {self.tokens:,} tokens needs"
                f" {_gb(self.on_gpu)}, and there are {_gb(self.gpu_memory)}. Use fewer tokens per"
                " pass, slots or resident layers, or more groups of experts."
            )
        held = sum(self.sizes.experts)
        if held > host_memory:
            raise ConfigError(
                f"The host lacks {_gb(held - host_memory)}: the experts take {_gb(held)}"
                f"{' until they are compressed' if self.sizes.compressed else ''}, and there"
                f" are {_gb(host_memory)} (--host-memory)."
            )

    def text(self) -> str:
        """The plan for people."""
        sizes, costs = self.sizes, self.costs
        known = "measured here" if costs.is_measured else "assumed; --measure measures them"
        lines = [
            f"{len(sizes.experts)} layers with {_gb(sum(sizes.experts))} of experts;"
            f" {_gb(sizes.rest)} of everything else",
            f"host   {_gb(self.host_bytes):>9}  experts"
            + (f", {_gb(sum(sizes.experts))} until compressed" if sizes.compressed else ""),
            f"GPU    {_gb(self.on_gpu):>9}  of {_gb(self.gpu_memory)}: {_gb(sizes.rest)} model,"
            f" {_gb(self.slot_bytes)} in {self.slots} slots"
            + (f" of 1/{self.groups} layer" if self.groups > 1 else "")
            + (" and a workspace" if sizes.compressed else "")
            + f", {_gb(self.resident_bytes)} resident,"
            f" {_gb(costs.activations)} activations"
            + (f", {_gb(self.cache_bytes)} keys and values" if self.generated else "")
            + (f", {_gb(self.expert_cache)} cached experts" if self.expert_cache else ""),
            f"pass   {self.seconds:8.2f} s  {self.tokens:,} tokens,"
            f" {self.tokens / self.seconds:,.0f} tokens/s; it waits for {self.limit}",
            f"       copies {self.copying:.2f} s at {costs.link / GIGABYTE:.1f} GB/s, computation"
            f" {self.computing:.2f} s ({known})"
            + (f", {self.decompressing:.2f} s of it decompresses" if sizes.compressed else ""),
            f"       copies cost nothing from {self.hiding_tokens:,} tokens per pass",
        ]
        if self.generated:
            total = self.sequences * self.generated
            lines.append(
                f"then   {self.generating:8.2f} s  {self.generated} tokens for each of"
                f" {self.sequences:,} sequences, {total / self.generating:,.0f} tokens/s"
            )
            chosen = next(filter(None, map(self._chosen, range(self._cut))), None)
            lines.append(
                f"       a step copies {_gb(self.copied_by_step)}: "
                + (
                    "all experts"
                    if chosen is None
                    else f"a layer's tokens choose about {chosen[0]:.0f} of {chosen[1]} experts"
                    " if they choose evenly" + (", less those cached" if self.expert_cache else "")
                )
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
