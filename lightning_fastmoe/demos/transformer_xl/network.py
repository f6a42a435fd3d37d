"""The network: relative attention with memory, and mixtures of experts as feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_fastmoe.demos.byte_lm.model import VOCAB_SIZE
from lightning_fastmoe.demos.transformer_xl.attention import RelativeAttention
from lightning_fastmoe.errors import ShapeError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.transformer import Embedding, Linear


class Block(nn.Module):
    """One layer: attention, then a mixture of experts, each normalised first and added to x."""

    def __init__(self, d_model: int, num_heads: int, moe: MoE, init_std: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = RelativeAttention(d_model, num_heads, init_std)
        self.moe_norm = nn.RMSNorm(d_model)
        self.moe = moe

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """Transforms (batch, L, d_model), given earlier inputs, (batch, M, d_model)."""
        # The memory is normalised here, with today's weights, like the states it precedes.
        before = None if memory is None else self.attention_norm(memory)
        x = x + self.attention(self.attention_norm(x), before)
        out: Tensor = x + self.moe(self.moe_norm(x))
        return out


class MoETransformerXL(nn.Module):
    """Byte embedding, ``num_layers`` blocks, and an output layer for the next byte.

    It keeps no memory itself: it takes one and returns what the next one is made of.
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ffn: int,
        num_experts: int,
        top_k: int,
        load_balancing: float | None,
        init_std: float,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(VOCAB_SIZE, d_model, init_std)
        self.blocks = nn.ModuleList(
            Block(
                d_model,
                num_heads,
                MoE(
                    d_model,
                    d_ffn,
                    num_experts,
                    top_k,
                    load_balancing=load_balancing,
                    init_std=init_std,
                    autoregressive=True,
                ),
                init_std,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        self.readout = Linear(d_model, VOCAB_SIZE, init_std)

    def forward(self, tokens: Tensor, memory: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Predicts each next byte of a segment.

        Args:
            tokens: bytes in any integer dtype, (batch, L).
            memory: per layer its inputs at the positions before, (batch, M, d_model); may be empty.

        Returns:
            Logits, (batch, L, 256), and the inputs of each layer, (batch, L, d_model).

        Raises:
            ShapeError: if the memory is of another number of streams than the tokens.
        """
        if memory and len(memory[0]) != len(tokens):
            raise ShapeError(
                f"The memory is of {len(memory[0])} streams, and the batch has {len(tokens)} rows; "
                "each row must continue its stream. Keep the batch size, or reset the memory."
            )
        x = self.embedding(tokens.long())
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            hidden.append(x)
            x = block(x, memory[i].to(x) if memory else None)
        logits: Tensor = self.readout(self.norm(x))
        return logits, hidden
