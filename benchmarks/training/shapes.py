"""The models that are trained, as configs of Qwen3-MoE, and their floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A model and its batches.

    Attributes:
        layers: number of blocks, all of them with experts.
        d_model: width, D.
        heads: heads of queries.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        d_ffn: inner width of an expert, F.
        num_experts: E.
        top_k: K.
        vocab_size: V.
        batch: sequences per step.
        seq_len: tokens of a sequence.
    """

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ffn: int
    num_experts: int
    top_k: int
    vocab_size: int
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.seq_len

    def config(self) -> dict[str, Any]:
        """The content of a ``config.json``."""
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ffn,  # of layers without experts; there are none
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.d_ffn,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": self.seq_len,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward: the model's, not what is recomputed.

        Six per weight that a token is multiplied with, and six per layer for each of its heads'
        elements and each position before it, of which there are half a sequence on average, twice:
        for the scores and for the values.
        """
        attention = self.d_model * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        experts = self.top_k * 3 * self.d_model * self.d_ffn
        router = self.d_model * self.num_experts
        weights = self.layers * (attention + experts + router) + self.d_model * self.vocab_size
        return 6.0 * weights + 6.0 * self.layers * self.seq_len * self.heads * self.head_dim

    def batches(self, count: int, rank: int = 0) -> list[Tensor]:
        """``count`` batches (batch, seq_len + 1) of token ids, others on each rank.

        Frequencies fall with the rank as those of words do, so that the router's load is uneven as
        in the first steps of real training.
        """
        generator = torch.Generator().manual_seed(rank)
        chances = 1.0 / torch.arange(1, self.vocab_size + 1, dtype=torch.float64)
        size = self.batch * (self.seq_len + 1)
        return [
            torch.multinomial(chances, size, replacement=True, generator=generator).view(
                self.batch, self.seq_len + 1
            )
            for _ in range(count)
        ]


SHAPES = {
    "gpu_lm": Shape(8, 1024, 16, 16, 64, 640, 64, 8, 256, 16, 1024),
    "olmoe": Shape(4, 2048, 16, 16, 128, 1024, 64, 8, 50304, 8, 4096),
    "qwen3": Shape(4, 2048, 32, 4, 128, 768, 128, 8, 151936, 4, 4096),
    "olmoe-1b-7b": Shape(16, 2048, 16, 16, 128, 1024, 64, 8, 50304, 4, 4096),
    "qwen3-8-layers": Shape(8, 2048, 32, 4, 128, 768, 128, 8, 151936, 4, 4096),
    "tiny": Shape(2, 64, 4, 2, 16, 32, 8, 2, 256, 2, 32),
}
