"""The layer sizes that are measured, and their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from layer.errors import BenchmarkError


@cache
def gated_activations() -> Mapping[str, str]:
    """The package's gated activations -> the plain activation applied to the gate.

    The package is imported at the first call, which comes after a peer's start: that is timed, and
    ours includes the import.
    """
    from lightning_fastmoe.ops.activation import GATED

    return GATED


@dataclass(frozen=True)
class Config:
    """One MoE layer and the batch that it gets.

    Attributes:
        name: how the command line calls it.
        tokens: T.
        d_model: D.
        d_ffn: F, the inner width of one expert.
        num_experts: E.
        top_k: K.
        activation: a gated one has an up projection of 2F rows.
        source: where the sizes come from.
    """

    name: str
    tokens: int
    d_model: int
    d_ffn: int
    num_experts: int
    top_k: int
    activation: str
    source: str

    @property
    def gated(self) -> bool:
        """Whether an expert has three matrices rather than two."""
        return self.activation in gated_activations()

    @property
    def pairs(self) -> int:
        """T*K, the rows that the experts compute."""
        return self.tokens * self.top_k

    @property
    def forward_flops(self) -> int:
        """6TKDF for gated experts, 4TKDF for others: 2 per multiply-add, the matrices alone."""
        matrices = 3 if self.gated else 2
        return 2 * matrices * self.pairs * self.d_model * self.d_ffn

    @property
    def step_flops(self) -> int:
        """Forward and backward: each product of the forward costs two more."""
        return 3 * self.forward_flops

    def tiny(self) -> Config:
        """The same layer in miniature: odd counts stay odd, nothing takes longer than a blink."""
        experts = min(self.num_experts, 8)
        return replace(
            self, tokens=61, d_model=32, d_ffn=24, num_experts=experts, top_k=min(self.top_k, 4)
        )


_ALL = (
    Config("sonic-7b", 24576, 1536, 256, 128, 8, "swiglu", "SonicMoE's 7B model"),
    Config("olmoe-1b-7b", 32768, 2048, 1024, 64, 8, "swiglu", "OLMoE-1B-7B"),
    Config("qwen3-30b-a3b", 32768, 2048, 768, 128, 8, "swiglu", "Qwen3-30B-A3B"),
    Config("sonic-30b", 32768, 4096, 1024, 64, 4, "swiglu", "SonicMoE's 30B model"),
    Config("mixtral-8x7b", 8192, 4096, 14336, 8, 2, "swiglu", "Mixtral-8x7B"),
    Config("fastmoe-16", 4096, 1024, 4096, 16, 2, "gelu", "FastMoE's benchmark, 16 experts"),
    Config("fastmoe-64", 8192, 1024, 4096, 64, 2, "gelu", "FastMoE's benchmark, 64 experts"),
    Config("switch-8", 32768, 768, 3072, 8, 1, "gelu", "a Switch layer of width 768, GELU"),
    Config(
        "deepseek-v3",
        8192,
        7168,
        2048,
        32,
        8,
        "swiglu",
        "DeepSeek-V3: the 32 experts of one rank of 8, with as many pairs as 8 ranks of 8192"
        " tokens send it",
    ),
    Config("gpt-oss-20b", 16384, 2880, 2880, 32, 4, "swiglu", "gpt-oss-20b, plain SwiGLU, no bias"),
    Config("qwen3-next", 32768, 2048, 512, 512, 10, "swiglu", "Qwen3-Next-80B-A3B"),
    Config("switch-base-8", 16384, 768, 3072, 8, 1, "relu", "Switch-Base-8, ReLU"),
)

CONFIGS = {config.name: config for config in _ALL}
"""All configurations by name, in the order of the tables."""


def parse_configs(text: str) -> list[Config]:
    """``"all"`` or comma-separated names.

    Raises:
        BenchmarkError: for an unknown name.
    """
    if text == "all":
        return list(_ALL)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CONFIGS]
    if unknown or not names:
        raise BenchmarkError(
            f"--configs {text!r}: {', '.join(unknown) or 'nothing'} is not a configuration. Take"
            f" 'all' or some of: {', '.join(CONFIGS)}."
        )
    return [CONFIGS[name] for name in names]
