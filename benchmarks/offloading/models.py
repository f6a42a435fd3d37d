"""Models that score and generate, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "mixtral-8x7b": ("mixtral", {"num_hidden_layers": 32}),  # transformers' defaults
    "tiny": (
        "qwen3_moe",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),  # for trials
}
"""transformers' family, and what its config says."""


def device() -> torch.device:
    """The GPU; the CPU for a trial."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(name: str, layers: int | None = None) -> Any:
    """The config of one of :data:`MODELS`, with fewer layers if asked."""
    from transformers import AutoConfig

    family, sizes = MODELS[name]
    options = {"max_position_embeddings": 4096, "use_cache": False, "tie_word_embeddings": False}
    if layers is not None:
        options["num_hidden_layers"] = layers
    return AutoConfig.for_model(family, **{**sizes, **options})


def build(name: str, layers: int | None = None) -> nn.Module:
    """The model on the CPU, its weights drawn on the GPU, which takes a minute for 60 GB."""
    from transformers import AutoModelForCausalLM

    config = config_of(name, layers)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation="fastmoe"
        )
    generator = torch.Generator(device()).manual_seed(0)
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                host = torch.empty(old.shape, dtype=torch.bfloat16)
                if old.dim() == 1:
                    host.fill_(1.0)
                else:
                    drawn = torch.randn(old.shape, generator=generator, device=device())
                    host.copy_((0.02 * drawn).bfloat16())
                module._parameters[name] = nn.Parameter(host, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # type: ignore[union-attr, operator]
    return model.eval()
