"""The supported model families of transformers.

Tensor names are those on the Hugging Face Hub (one matrix per expert), which all versions of
transformers, vLLM and others read; transformers 5 stacks the experts while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """A model family, with its names in ``config.json`` and in files.

    Attributes:
        name: ``model_type``.
        architecture: the class in transformers.
        block: name of a layer's feed-forward block in files.
        projections: names of an expert's gate, up and down projections in files.
        width: the field with an expert's inner width, F.
        experts: the field with the number of experts, E.
        qk_norm: norms of queries and keys: "none", over each "head", or over their whole "width".
        reads: fields that this family reads and some others ignore.
        defaults: defaults of fields that a ``config.json`` leaves out.
    """

    name: str
    architecture: str
    block: str
    projections: tuple[str, str, str]
    width: str
    experts: str
    qk_norm: str
    reads: frozenset[str]
    defaults: Mapping[str, Any]


_COMMON = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "decoder_sparse_step": 1,
    "head_dim": None,
    "initializer_range": 0.02,
    "mlp_only_layers": None,
    "rope_theta": 10_000.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "use_sliding_window": True,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "block_sparse_moe",
            ("w1", "w3", "w2"),
            "intermediate_size",
            "num_local_experts",
            "none",
            frozenset({"router_jitter_noise"}),
            MappingProxyType(
                _COMMON
                | {
                    "vocab_size": 32_000,
                    "hidden_size": 4096,
                    "intermediate_size": 14_336,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "rms_norm_eps": 1e-5,
                    "num_experts_per_tok": 2,
                    "num_local_experts": 8,
                    "norm_topk_prob": True,  # not a field of Mixtral's, which always normalises
                    "rope_theta": 1_000_000.0,
                }
            ),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "mlp",
            ("gate_proj", "up_proj", "down_proj"),
            "moe_intermediate_size",
            "num_experts",
            "head",
            frozenset(
                {
                    "attention_bias",
                    "decoder_sparse_step",
                    "mlp_only_layers",
                    "norm_topk_prob",
                    "use_sliding_window",
                }
            ),
            MappingProxyType(
                _COMMON
                | {
                    "vocab_size": 151_936,
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 4,
                    "rms_norm_eps": 1e-6,
                    "num_experts_per_tok": 8,
                    "num_experts": 128,
                    "norm_topk_prob": False,
                    "moe_intermediate_size": 768,
                    "use_sliding_window": False,
                }
            ),
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            "mlp",
            ("gate_proj", "up_proj", "down_proj"),
            "intermediate_size",
            "num_experts",
            "width",
            frozenset({"attention_bias", "clip_qkv", "norm_topk_prob"}),
            MappingProxyType(
                _COMMON
                | {
                    "vocab_size": 50_304,
                    "hidden_size": 2048,
                    "intermediate_size": 2048,
                    "num_hidden_layers": 16,
                    "num_attention_heads": 16,
                    "num_key_value_heads": None,
                    "rms_norm_eps": 1e-5,
                    "num_experts_per_tok": 8,
                    "num_experts": 64,
                    "norm_topk_prob": False,
                }
            ),
        ),
    )
}
"""Families by ``model_type``."""

NOT_ALL_READ: frozenset[str] = frozenset().union(*(f.reads for f in FAMILIES.values()))
"""Fields that are ignored in the families that don't read them."""
