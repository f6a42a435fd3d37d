"""A decoder-only transformer over bytes whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from typing_extensions import override

from lightning_fastmoe.demos.compilation import is_compiled
from lightning_fastmoe.demos.optimization import adamw_with_cosine
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, compile_blocks
from lightning_fastmoe.nn.compilation import check_cuda_graphs
from lightning_fastmoe.nn.transformer import (
    Embedding,
    Linear,
    rotary_table,
    rotate,
    rows_of_table,
)
from lightning_fastmoe.planning.sizes import model_size
from lightning_fastmoe.planning.units import count_text

VOCAB_SIZE = 256
"""One token per byte value."""


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, d_model: int, num_heads: int, init_std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(d_model, 3 * d_model, init_std)
        self.query_norm = nn.RMSNorm(d_model // num_heads)
        self.key_norm = nn.RMSNorm(d_model // num_heads)
        self.out = Linear(d_model, d_model, init_std)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Mix (batch, seq_len, d_model) over positions."""
        batch, seq_len, d_model = x.shape
        heads = self.qkv(x).view(batch, seq_len, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query = rotate(self.query_norm(query), table)
        key = rotate(self.key_norm(key), table)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, seq_len, d_model))
        return out


class Block(nn.Module):
    """One layer: attention, then a mixture of experts, each normalised first and added to x."""

    row_arguments: ClassVar = {"table": rows_of_table, "tokens": 0}
    """How arguments are split into chunks of sequences."""

    def __init__(self, d_model: int, num_heads: int, moe: MoE, init_std: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = Attention(d_model, num_heads, init_std)
        self.moe_norm = nn.RMSNorm(d_model)
        self.moe = moe

    def forward(self, x: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
        """Transform (batch, seq_len, d_model); ``tokens`` are the bytes, for hash routing."""
        x = x + self.attention(self.attention_norm(x), table)
        out: Tensor = x + self.moe(self.moe_norm(x), token_ids=tokens)
        return out


def _known(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns ``arguments`` if ``MoE`` takes them and the model doesn't set them itself."""
    own = {"router", "load_balancing", "z_loss", "init_std", "autoregressive", "top_k"}
    known = inspect.signature(MoE).parameters.keys() - own - {"d_model", "d_ffn", "num_experts"}
    if unknown := sorted(arguments.keys() - known):
        raise ConfigError(
            f"model.moe has {', '.join(unknown)}; it may have: {', '.join(sorted(known))}."
        )
    return arguments


class MoETransformer(nn.Module):
    """The network: byte embedding, ``num_layers`` blocks, and an output layer for the next byte."""

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ffn: int,
        num_experts: int,
        top_k: int | None,
        router: str,
        load_balancing: float | None,
        z_loss: float | None,
        moe: dict[str, Any] | None,
        init_std: float,
    ) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
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
                    router=router,
                    load_balancing=load_balancing,
                    z_loss=z_loss,
                    init_std=init_std,
                    autoregressive=True,
                    **_known(moe or {}),
                ),
                init_std,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        # Not tied to the embedding: a weight shared by two modules complicates ZeRO stage 3, and
        # 256 rows cost next to nothing.
        self.readout = Linear(d_model, VOCAB_SIZE, init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict each next byte.

        Args:
            tokens: Bytes in any integer dtype, (batch, seq_len).

        Returns:
            Logits, (batch, seq_len, 256).
        """
        table = rotary_table(tokens.shape[1], self.head_dim, tokens.device)
        x = self.embedding(tokens.long())
        for block in self.blocks:
            x = block(x, table, tokens)
        logits: Tensor = self.readout(self.norm(x))
        return logits


def _describe(network: MoETransformer) -> str:
    """One line about the network's size over all ranks; all ranks must call it."""
    size = model_size(network)
    first = next(iter(size.layers.values()))
    return (
        f"Model: {count_text(size.total)} parameters, {count_text(size.active)} used per byte; "
        f"{len(size.layers)} layers of {first.num_experts} experts, "
        f"{first.num_local_experts} of them on each rank."
    )


class MoELanguageModel(LightningModule):
    """A byte-level language model with mixture-of-experts layers, and how it is trained.

    Args:
        d_model: Width of the residual stream.
        num_layers: Number of blocks, each attention + mixture of experts.
        num_heads: Attention heads; `d_model` must be an even multiple of it.
        d_ffn: Inner width of one expert.
        num_experts: Experts per layer, over all processes.
        top_k: Experts per byte; null for routers without a fixed number.
        router: Name of a router, or the path of its class.
        load_balancing: Weight of the load-balancing loss; null is the router's default.
        z_loss: Weight of the loss that keeps router logits small; null is the router's default.
        moe: Further arguments of each `MoE` layer, by name (`router_options`, `bias`, ...).
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of `lr`.
        warmup_steps: Steps over which the learning rate rises from 0; a cosine follows.
        weight_decay: AdamW's weight decay for matrices (not for embeddings and norms).
        betas: AdamW's decay rates of the averages of the gradient and of its square.
        init_std: Standard deviation of the initial weights.
        compile: Whether `torch.compile` compiles each block, which takes some ten seconds in the
            first step; null compiles them on CUDA.
        cuda_graphs: Whether compiled blocks are launched as CUDA graphs, which takes the host less
            time: worth it with sharded experts. All batches should have one shape.

    Raises:
        ConfigError: if `d_model` isn't an even multiple of `num_heads`, or `cuda_graphs` has no
            effect.
    """

    def __init__(
        self,
        d_model: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        d_ffn: int = 256,
        num_experts: int = 8,
        top_k: int | None = 2,
        router: str = "softmax",
        load_balancing: float | None = None,
        z_loss: float | None = None,
        moe: dict[str, Any] | None = None,
        lr: float = 1e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        init_std: float = 0.02,
        compile: bool | None = None,  # noqa: A002  named in config files
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        if d_model % (2 * num_heads):
            raise ConfigError(
                f"model.d_model is {d_model} and model.num_heads is {num_heads}; d_model must be a "
                "multiple of 2 * num_heads, because rotary positions rotate pairs of each head's "
                "dimensions. Change either."
            )
        check_cuda_graphs(cuda_graphs, compile)
        self.save_hyperparameters()
        self.lr = lr
        self.min_lr_ratio = min_lr_ratio
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.betas = betas
        self._compiles, self._cuda_graphs = compile, cuda_graphs
        self._arguments: dict[str, Any] = {
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ffn": d_ffn,
            "num_experts": num_experts,
            "top_k": top_k,
            "router": router,
            "load_balancing": load_balancing,
            "z_loss": z_loss,
            "moe": moe,
            "init_std": init_std,
        }
        self.network: MoETransformer | None = None

    @override
    def configure_model(self) -> None:
        # Built here rather than in the constructor, because now the strategy knows the ranks and
        # each creates only its own experts. Lightning may call this more than once.
        if self.network is None:
            self.network = MoETransformer(**self._arguments)
            rank_zero_info(_describe(self.network))
            if is_compiled(self, self._compiles):
                compile_blocks(self.network.blocks, cuda_graphs=self._cuda_graphs)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Predict each next byte: (batch, seq_len) to logits (batch, seq_len, 256)."""
        if self.network is None:
            raise ConfigError(
                "The network isn't built yet. A Trainer builds it; without one, call "
                "configure_model() first."
            )
        logits: Tensor = self.network(tokens)
        return logits

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._nats_per_byte(batch).mean()
        self._log_loss("train", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._log_loss("val", self._nats_per_byte(batch).mean(), batch)

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._log_loss("test", self._nats_per_byte(batch).mean(), batch)

    @override
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Bits per byte of each window, (batch,)."""
        return self._nats_per_byte(batch).mean(dim=-1) / math.log(2)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw_with_cosine(
            self,
            lr=self.lr,
            min_lr_ratio=self.min_lr_ratio,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
        )

    def _nats_per_byte(self, windows: Tensor) -> Tensor:
        """Cross-entropy of each byte but the first: (batch, seq_len + 1) to (batch, seq_len)."""
        logits = self(windows[:, :-1]).float()
        targets = windows[:, 1:].long()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    def _log_loss(self, stage: str, loss: Tensor, batch: Tensor) -> None:
        options: dict[str, Any] = {"sync_dist": True, "batch_size": len(batch)}
        self.log(f"{stage}_loss", loss, **options)
        self.log(f"{stage}_bpb", loss / math.log(2), prog_bar=True, **options)
