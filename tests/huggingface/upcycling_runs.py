"""What the ranks run in test_upcycling.py: training a model that is upcycled where it is built."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.huggingface import upcycle
from lightning_fastmoe.nn import moe_layers


class Upcycled(pl.LightningModule):
    """A small Llama whose FFNs become mixtures on each rank."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise, self.losses = noise, []

    def configure_model(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
        self.model = AutoModelForCausalLM.from_config(config)
        if self.noise >= 0:
            upcycle(self.model, 4, 2, noise=self.noise, load_balancing=0.0, z_loss=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def train(ep: int, noise: float) -> tuple[list[float], list[int]]:
    """Losses of three steps on the same batch on every rank, and the experts of each layer."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 50, (2, 9), generator=generator)] * 3
    module = Upcycled(noise)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ep,
        strategy=FastMoEStrategy(expert_parallel_size=ep, stage=2),
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.losses, [layer.num_local_experts for _, layer in moe_layers(module)]
