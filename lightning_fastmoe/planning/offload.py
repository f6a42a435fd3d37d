"""Predicts how long a pass takes whose experts are copied from host memory, and what limits it.

Copies run beside computation, from one pass into the next. So a pass takes the longer of the two:
copying all experts that don't stay on the GPU, or computing all layers and what surrounds them. A
pass of few tokens, as a step of generation for few sequences, copies the experts that its tokens
are expected to choose, once their router has run: then it computes after it copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.few_tokens import are_few, expected_experts
from lightning_fastmoe.planning.offload_sizes import GIGABYTE, OffloadSizes
from lightning_fastmoe.planning.units import bytes_text as _gb

_MORE = 8 * GIGABYTE
_BOTH_WAYS = 0.72
"""The link's rate each way, of that alone, if it copies both ways: an H100 with PCIe 5."""


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
        peers: bytes per second that a GPU receives from the others of its host; assumed of NVLink
            between H100s.
    """

    link: float
    layers: float
    rest: float
    activations: int
    step: float = 0.0
    decompression: float = 1.5e12
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
        expert_cache: bytes for experts that were used last.
        groups: of a layer's experts, of which a slot holds one.
        chunk: sequences of a chunk; None if blocks compute whole batches.
        host_cache: whether keys and values are in host memory.
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
    expert_cache: int = 0
    groups: int = 1
    chunk: int | None = None
    host_cache: bool = False
    gpus: int = 1

    @property
    def copied(self) -> float:
        """Bytes that a pass copies; with several GPUs, all of them together."""
        # Exchanges between GPUs bring whole layers.
        return self._copied(self.tokens if self.gpus == 1 else None)

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
        """Bytes of all keys and values, if tokens are generated."""
        if not self.generated:
            return 0
        return self.sizes.cache_per_token * (self.tokens + self.sequences * self.generated)

    @property
    def cache_on_host(self) -> int:
        """Host memory of keys and values, those of all GPUs."""
        return self.gpus * self.cache_bytes if self.host_cache else 0

    @property
    def cache_on_gpu(self) -> int:
        """GPU memory of keys and values; of a host cache a layer's of two chunks."""
        if not self.host_cache:
            return self.cache_bytes
        chunk = min(self.chunk or self.sequences, self.sequences)
        layers = self.sizes.layers or len(self.sizes.experts)
        return 2 * self.cache_bytes * chunk // (layers * self.sequences)

    @property
    def on_gpu(self) -> int:
        """GPU memory of everything."""
        weights = self.sizes.weights_on_gpu(self.slots, self.resident, self.groups)
        return weights + self.expert_cache + self.cache_on_gpu + self.costs.activations

    @property
    def copying(self) -> float:
        """Seconds of a pass's copies: experts one way, beside keys and values the other way.

        Of several GPUs each copies a part over its link, while others come from its peers.
        """
        return self._copying(self.copied)

    def _copying(self, copied: float) -> float:
        written = self.sizes.cache_per_token * self.tokens if self.cache_on_host else 0
        alone = max(0, copied / self.gpus - written)
        received = copied * (self.gpus - 1) / self.gpus
        return max((alone + written / _BOTH_WAYS) / self.costs.link, received / self.costs.peers)

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
        if self.gpus == 1 and self._are_few(self.tokens):
            return self.copying + self.computing
        return max(self.copying, self.computing)

    @property
    def limit(self) -> str:
        """What a pass waits for."""
        return "the link" if self.copying > self.computing else "the GPU"

    @property
    def hiding_tokens(self) -> int:
        """Tokens of a pass from which copies cost nothing."""
        computing = self.computing - self.decompressing  # which doesn't grow with tokens
        copying = self._copying(self._copied(None))
        return round(self.tokens * max(0.0, copying - self.decompressing) / computing)

    @property
    def generating(self) -> float:
        """Seconds of all steps of generation, whose copies are experts and keys and values."""
        held = self.tokens + self.sequences * self.generated / 2  # positions, on average
        cache = self.sizes.cache_per_token * held if self.cache_on_host else 0.0
        copying = (self.copied_by_step + cache) / self.costs.link
        computing = self.costs.step + self.decompressing
        after = self._are_few(self.sequences)
        return self.generated * (copying + computing if after else max(copying, computing))

    @property
    def copied_by_step(self) -> float:
        """Bytes that a step of generation copies, on each GPU by itself.

        With a cache, those that even choices don't find there; real ones repeat more often.
        """
        return self._copied(self.sequences)

    def _copied(self, tokens: int | None) -> float:
        """Bytes that a GPU needs for some tokens; None for so many that they need all experts."""
        moving = self.sizes.moving(self.resident)
        if self.slots >= len(moving) * self.groups:
            return 0  # each has a slot, which keeps it
        cached = min(1.0, self.expert_cache / sum(moving))
        total = 0.0
        for layer, size in enumerate(moving):
            chosen = None if tokens is None else self._chosen(layer, tokens)
            total += size if chosen is None else size * chosen[0] / chosen[1] * (1 - cached)
        return total

    def _are_few(self, tokens: int) -> bool:
        """Whether copies of a layer begin when its tokens have chosen."""
        keep_all = self.slots >= self._cut * self.groups
        return not keep_all and any(self._chosen(layer, tokens) for layer in range(self._cut))

    def _chosen(self, layer: int, tokens: int) -> tuple[float, int] | None:
        """The experts that tokens are expected to choose of a layer, of E; None if all are copied.

        Args:
            layer: its number.
            tokens: of a pass or step.
        """
        if self.chunk is not None and self.chunk < self.sequences:
            return None  # a layer is copied once, for all chunks
        experts, top_k = self.sizes.choices[layer] if self.sizes.choices else (0, 0)
        if not top_k or not tokens or not are_few(experts, top_k, tokens):
            return None
        return expected_experts(experts, top_k, tokens), experts

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
                f" {_gb(self.on_gpu)}, and there are {_gb(self.gpu_memory)}. Use {self._less()}."
            )
        experts, cache, until = sum(self.sizes.experts), self.cache_on_host, ""
        if self.sizes.compressed and self.host_bytes + cache > experts:
            experts = self.host_bytes
        elif self.sizes.compressed:  # which comes before there are keys and values
            cache, until = 0, " until they are compressed"
        if host_memory is not None and (missing := experts + cache - host_memory) > 0:
            keys = f" and keys and values {_gb(cache)}" if cache else ""
            raise ConfigError(
                f"The host lacks {_gb(missing)}: the experts take {_gb(experts)}{until}{keys}, and"
                f" there are {_gb(host_memory)} (--host-memory)."
            )

    def _less(self) -> str:
        """What takes memory and could be less."""
        options = ["fewer tokens per pass, slots or resident layers"]
        if self.chunk is None and not self.sizes.compressed and self.slot_bytes:
            options.append("more groups of experts (--groups)")
        if self.groups == 1 and (self.chunk is None or self.chunk > 1):
            options.append(f"{'chunks' if self.chunk is None else 'smaller chunks'} (--chunk)")
        if self.generated and not self.host_cache:
            options.append("a cache in host memory (--host-cache)")
        return ", or ".join(options)

    def text(self) -> str:
        """The plan for people."""
        sizes, costs = self.sizes, self.costs
        known = "measured here" if costs.is_measured else "assumed; --measure measures them"
        each = f" on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        lines = [
            f"{len(sizes.experts)} layers with {_gb(sum(sizes.experts))} of experts;"
            f" {_gb(sizes.rest)} of everything else",
            f"host   {_gb(self.host_bytes + self.cache_on_host):>9}  experts"
            + (f", {_gb(self.cache_on_host)} of it keys and values" if self.cache_on_host else "")
            + (f", {_gb(sum(sizes.experts))} until compressed" if sizes.compressed else ""),
            f"GPU    {_gb(self.on_gpu):>9}  of {_gb(self.gpu_memory)}: {_gb(sizes.rest)} model,"
            f" {_gb(self.slot_bytes)} in {self.slots} slots"
            + (f" of 1/{self.groups} layer" if self.groups > 1 else "")
            + (" and a workspace" if sizes.compressed else "")
            + f", {_gb(self.resident_bytes)} resident,"
            f" {_gb(costs.activations)} activations"
            + (f", {_gb(self.cache_on_gpu)} keys and values" if self.generated else "")
            + (f", {_gb(self.expert_cache)} cached experts" if self.expert_cache else ""),
            f"pass   {self.seconds:8.2f} s  {self.tokens:,} tokens{each}"
            + (f" in chunks of {self.chunk} sequences," if self.chunk else ",")
            + f" {self.gpus * self.tokens / self.seconds:,.0f} tokens/s; it waits for {self.limit}",
            f"       copies {self.copying:.2f} s at {costs.link / GIGABYTE:.1f} GB/s{each},"
            f" computation {self.computing:.2f} s ({known})"
            + (f", {self.decompressing:.2f} s of it decompresses" if sizes.compressed else ""),
            f"       copies cost nothing from {self.hiding_tokens:,} tokens per pass",
        ]
        if self.generated:
            total = self.sequences * self.generated
            lines.append(
                f"then   {self.generating:8.2f} s  {self.generated} tokens for each of"
                f" {self.sequences:,} sequences, {total / self.generating:,.0f} tokens/s"
            )
            lines.append(
                f"       a step copies {_gb(self.copied_by_step)}: {self._what_steps_copy()}"
            )
        more = self.with_more_memory()
        lines.append(
            f"8 GB more: {more.resident} resident layers, a pass of {more.seconds:.2f} s"
            + (f", generation of {more.generating:.2f} s" if self.generated else "")
        )
        return "\n".join(lines) + "\n"

    def _what_steps_copy(self) -> str:
        if not self.copied_by_step:
            return "what stays on the GPU is enough"
        layers = (self._chosen(layer, self.sequences) for layer in range(self._cut))
        chosen = next(filter(None, layers), None)
        if chosen is None:
            return "all experts"
        return (
            f"a layer's tokens choose about {chosen[0]:.0f} of {chosen[1]} experts if they choose"
            f" evenly{', less those cached' if self.expert_cache else ''}"
        )

    @property
    def _cut(self) -> int:
        return len(self.sizes.experts) - self.resident
