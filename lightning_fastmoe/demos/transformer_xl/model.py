"""How the network is trained: segment after segment, with the memory of those before."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.demos.optimization import adamw_with_cosine
from lightning_fastmoe.demos.transformer_xl.data import Segment
from lightning_fastmoe.demos.transformer_xl.memory import Memory
from lightning_fastmoe.demos.transformer_xl.network import MoETransformerXL
from lightning_fastmoe.errors import ConfigError


class TransformerXL(LightningModule):
    """Transformer-XL (Dai et al. 2019) over bytes, with mixture-of-experts layers.

    Attributes:
        memory: what training remembers of this rank's streams; `SegmentLoader` saves it.

    Args:
        d_model: Width of the residual stream.
        num_layers: Number of blocks, each attention + mixture of experts.
        num_heads: Attention heads.
        d_ffn: Inner width of one expert.
        num_experts: Experts per layer, over all processes.
        top_k: Experts per byte.
        mem_len: Positions before a segment that each layer remembers; 0 is no memory.
        load_balancing: Weight of the load-balancing loss; null is the router's default.
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of `lr`.
        warmup_steps: Steps over which the learning rate rises from 0; a cosine follows.
        weight_decay: AdamW's weight decay for matrices (not for embeddings, norms, u and v).
        betas: AdamW's decay rates of the averages of the gradient and of its square.
        init_std: Standard deviation of the initial weights.

    Raises:
        ConfigError: if `d_model` is odd or no multiple of `num_heads`, or `mem_len` is negative.
    """

    def __init__(
        self,
        d_model: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        d_ffn: int = 256,
        num_experts: int = 8,
        top_k: int = 2,
        mem_len: int = 128,
        load_balancing: float | None = None,
        lr: float = 1e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if d_model % 2 or d_model % num_heads:
            raise ConfigError(
                f"d_model is {d_model} and num_heads is {num_heads}; d_model must be even, as each "
                "distance has a sine and a cosine, and a multiple of num_heads. Change either."
            )
        self.save_hyperparameters()
        self._optimizer: dict[str, Any] = {
            "lr": lr,
            "min_lr_ratio": min_lr_ratio,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "betas": betas,
        }
        self._sizes: dict[str, Any] = {
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ffn": d_ffn,
            "num_experts": num_experts,
            "top_k": top_k,
            "load_balancing": load_balancing,
            "init_std": init_std,
        }
        self.network: MoETransformerXL | None = None
        self.memory = Memory(mem_len)
        # Validation interrupts training in the middle of its streams.
        self._evaluation_memory = Memory(mem_len)

    @override
    def configure_model(self) -> None:
        # Built here, where each rank creates only its own experts. Lightning may call it twice.
        if self.network is None:
            self.network = MoETransformerXL(**self._sizes)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, L, 256) for bytes (batch, L) at the start of a stream."""
        logits: Tensor = self._built()(tokens)[0]
        return logits

    @override
    def training_step(self, batch: Segment, batch_idx: int) -> Tensor:
        loss = self._nats_per_byte(batch, self.memory).mean()
        self._log_loss("train", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: Segment, batch_idx: int) -> None:
        loss = self._nats_per_byte(batch, self._evaluation_memory).mean()
        self._log_loss("val", loss, batch)

    @override
    def test_step(self, batch: Segment, batch_idx: int) -> None:
        loss = self._nats_per_byte(batch, self._evaluation_memory).mean()
        self._log_loss("test", loss, batch)

    @override
    def predict_step(self, batch: Segment, batch_idx: int) -> Tensor:
        """Bits per byte of each stream's segment, (batch,)."""
        return self._nats_per_byte(batch, self._evaluation_memory).mean(dim=-1) / math.log(2)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw_with_cosine(self, **self._optimizer)

    def _nats_per_byte(self, segment: Segment, memory: Memory) -> Tensor:
        """Cross-entropy of each byte but the first, (batch, seq_len); the memory moves on."""
        if segment.starts:
            memory.reset()
        logits, hidden = self._built()(segment.tokens[:, :-1], memory.layers)
        memory.append(hidden)
        targets = segment.tokens[:, 1:].long()
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")

    def _built(self) -> MoETransformerXL:
        if self.network is None:
            raise ConfigError(
                "The network isn't built yet. A Trainer builds it; without one, call "
                "configure_model() first."
            )
        return self.network

    def _log_loss(self, stage: str, loss: Tensor, segment: Segment) -> None:
        options: dict[str, Any] = {"sync_dist": True, "batch_size": len(segment.tokens)}
        self.log(f"{stage}_loss", loss, **options)
        self.log(f"{stage}_bpb", loss / math.log(2), prog_bar=True, **options)
