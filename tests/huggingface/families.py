"""Tiny random models of transformers, one of each family and a few variants."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}

CONFIGS = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "qwen3_moe with a dense layer": (
        "Qwen3MoeConfig",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {"intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2},
    ),
    "olmoe with limits": (
        "OlmoeConfig",
        {
            "intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "clip_qkv": 0.5,
        },
    ),
}

TOLERANCE = 1e-4
"""Tolerance of logits between -7 and 7, in fp32: the same sums in another order, 1e-5 was seen.

A wrong convention (weights normalised or not, epsilon, positions) changes them by 0.1 and more."""


def family_of(name: str) -> str:
    return name.split()[0]


def make_model(name: str, seed: int = 0):
    """A model of transformers, in which every weight matters."""
    kind, sizes = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_tokens(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length))


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    out = model.eval()(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def files_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )
