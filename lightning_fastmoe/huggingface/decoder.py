"""The decoder shared by Mixtral, Qwen3-MoE and OLMoE, with this package's MoE layer.

Modules are named as in transformers, so weights map by name; only the inside of a MoE layer differs
(see ``architecture``).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe.huggingface.architecture import Architecture
from lightning_fastmoe.huggingface.batch import Layout
from lightning_fastmoe.huggingface.head import Head, summed_cross_entropy
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.transformer import (
    Embedding,
    Linear,
    rotary_table,
    rotate,
    rows_of_table,
)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries.

    Several queries share a key and value (Ainslie et al. 2023). Queries and keys are normalised
    over each head (Qwen3), over all heads together (OLMoE), or not at all.
    """

    def __init__(self, about: Architecture) -> None:
        super().__init__()
        self.head_dim = about.head_dim
        self.clip, self.dropout = about.clip_qkv, about.attention_dropout
        self.norm_whole = about.qk_norm == "width"
        queries, keys = about.num_heads * about.head_dim, about.num_kv_heads * about.head_dim
        bias, std = about.attention_bias, about.init_std
        self.q_proj = Linear(about.d_model, queries, std, bias=bias)
        self.k_proj = Linear(about.d_model, keys, std, bias=bias)
        self.v_proj = Linear(about.d_model, keys, std, bias=bias)
        self.o_proj = Linear(queries, about.d_model, std, bias=bias)
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        if about.qk_norm != "none":
            widths = (queries, keys) if self.norm_whole else (about.head_dim, about.head_dim)
            self.q_norm = nn.RMSNorm(widths[0], about.norm_eps)
            self.k_norm = nn.RMSNorm(widths[1], about.norm_eps)

    def forward(self, x: Tensor, table: Tensor, layout: Layout | None = None) -> Tensor:
        """Mixes ``x (batch, seq_len, d_model)`` over the positions of each sequence."""
        query = rotate(self._heads(self.q_proj(x), self.q_norm), table)
        key = rotate(self._heads(self.k_proj(x), self.k_norm), table)
        value = self._heads(self.v_proj(x), None)
        mask = None if layout is None else layout.attention_mask
        if mask is not None:
            # With a mask and grouped queries torch has no memory-efficient kernel.
            shared = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=mask is None,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """(batch, seq_len, heads * head_dim) -> (batch, heads, seq_len, head_dim)"""
        if norm is not None and self.norm_whole:
            x = norm(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not self.norm_whole:
            x = norm(x)
        return x.transpose(1, 2)


class DenseMLP(nn.Module):
    """The SwiGLU of a layer without experts."""

    def __init__(self, d_model: int, width: int, init_std: float) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, width, init_std)
        self.up_proj = Linear(d_model, width, init_std)
        self.down_proj = Linear(width, d_model, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Applies it to ``x (..., d_model)``."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP, each normalised first and added to its input."""

    row_arguments: ClassVar = {"table": rows_of_table, "layout": Layout.rows}
    """How arguments are split into chunks of sequences."""

    def __init__(self, about: Architecture, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention(about)
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(about.d_model, about.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(about.d_model, about.norm_eps)

    def forward(self, x: Tensor, table: Tensor, layout: Layout | None = None) -> Tensor:
        """Transforms ``x (batch, seq_len, d_model)``."""
        x = x + self.self_attn(self.input_layernorm(x), table, layout)
        h = self.post_attention_layernorm(x)
        out: Tensor = x + (self.mlp(h) if layout is None else self._feed_forward(h, layout))
        return out

    def _feed_forward(self, h: Tensor, layout: Layout) -> Tensor:
        """Applies the MLP or experts to all tokens but padding, which gets zeros."""
        rows = h.flatten(0, 1)
        # Removed here rather than by MoE(mask=), which would sync with the device in each layer.
        inputs = rows if layout.real is None else rows.index_select(0, layout.real)
        if isinstance(self.mlp, MoE):
            y = self.mlp(inputs, sequence_ids=layout.real_sequence_ids)
        else:
            y = self.mlp(inputs)
        if layout.real is not None:
            y = y.new_zeros(rows.shape).index_copy(0, layout.real, y)
        out: Tensor = y.view(h.shape)
        return out


class _Backbone(nn.Module):
    """Everything but the head; ``model`` in transformers."""

    def __init__(self, about: Architecture, load_balancing: float, z_loss: float) -> None:
        super().__init__()
        self.embed_tokens = Embedding(about.vocab_size, about.d_model, about.init_std)
        self.layers = nn.ModuleList(
            DecoderLayer(about, self._mlp(about, index, load_balancing, z_loss))
            for index in range(about.num_layers)
        )
        self.norm = nn.RMSNorm(about.d_model, about.norm_eps)

    @staticmethod
    def _mlp(about: Architecture, index: int, load_balancing: float, z_loss: float) -> nn.Module:
        if index in about.dense_layers:
            return DenseMLP(about.d_model, about.dense_layers[index], about.init_std)
        return MoE(
            about.d_model,
            about.d_ffn,
            about.num_experts,
            about.top_k,
            normalize_weights=about.normalize_weights,
            load_balancing=load_balancing,
            z_loss=z_loss,
            init_std=about.init_std,
        )


class MoEDecoder(nn.Module):
    """A causal language model of one of the families in ``huggingface.families``.

    With the same weights, its logits equal those of transformers up to rounding. It is for training
    and has no KV cache; export it to generate text.

    Args:
        about: from :meth:`Architecture.from_config`.
        load_balancing: coefficient of the load-balancing loss.
        z_loss: coefficient of the router z-loss.
    """

    def __init__(
        self, about: Architecture, *, load_balancing: float = 0.01, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = about.head_dim, about.rope_theta
        self.model = _Backbone(about, load_balancing, z_loss)
        self.lm_head = Head(about.d_model, about.vocab_size, about.init_std)

    def compile_loss(self) -> None:
        """Has the loss of large logits computed by a compiled kernel, on CUDA."""
        if isinstance(self.lm_head, Head):
            self.lm_head.compiles_loss = True

    def forward(
        self, tokens: Tensor, layout: Layout | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Predicts each next token.

        Args:
            tokens: (batch, seq_len), any integer dtype.
            layout: padding and packed documents, from
                :func:`~lightning_fastmoe.huggingface.batch.read_layout`; None without them.
            targets: (batch, seq_len - 1) int64, the token after each position, -100 for those that
                don't count; None returns logits.

        Returns:
            Logits, (batch, seq_len, vocab_size); undefined for padding. With ``targets`` the sum of
            their cross-entropies in nats, a scalar.
        """
        positions = None if layout is None else layout.positions
        table = rotary_table(
            tokens.shape[1], self.head_dim, tokens.device, self.rope_theta, positions
        )
        if layout is not None:
            # The id of padding may lie outside the embedding table.
            tokens = tokens.masked_fill(layout.sequence_ids < 0, 0)
            # Before the layers, as their graphs read it. Not if something has replaced their
            # forward to compute chunks of sequences: those have masks of their own, and that of
            # all sequences might not fit into memory.
            if "forward" not in self.model.layers[0].__dict__:
                layout.keep_mask()
        x = self.model.embed_tokens(tokens.long())
        for layer in self.model.layers:
            x = layer(x, table, layout)
        x = self.model.norm(x)
        if (
            targets is not None
            and isinstance(self.lm_head, Head)
            and self.lm_head.computes_loss_of(x)
        ):
            total: Tensor = self.lm_head(x[:, :-1].flatten(0, 1), targets.flatten())
            return total
        logits: Tensor = self.lm_head(x)
        if targets is None:
            return logits
        return summed_cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
