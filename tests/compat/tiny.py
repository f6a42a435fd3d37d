"""The model of the frozen checkpoint. Changing it makes the checkpoint useless."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy, MoE

WIDTH, EXPERTS, STEPS, SAVED = 4, 4, 4, 2


class Tiny(pl.LightningModule):
    """One step per epoch on data that depends on the epoch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH, bias=False)
        self.moe = MoE(WIDTH, 5, EXPERTS, 2, load_balancing=0.0)
        self.head = nn.Linear(WIDTH, 1, bias=False)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps_seen += 1
        h = self.embed(batch)
        loss = (self.head(h + self.moe(h)) - batch.sum(-1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)]

    def train_dataloader(self) -> DataLoader[Any]:
        # No generator: what torch draws may change, this may not.
        values = torch.arange(4 * 6 * 3, dtype=torch.float32).view(4, 6, 3)
        batch = torch.sin(values * (1.7 + self.trainer.current_epoch))
        own = batch.chunk(self.trainer.world_size)[self.trainer.global_rank]
        return DataLoader([own], batch_size=None)


def make_trainer(world: int, ep: int, stage: int, epochs: int, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(ep, stage=stage),
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def write(path: str) -> list[float]:
    """Trains on two ranks, saves half-way; this rank's losses."""
    pl.seed_everything(1, verbose=False)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == SAVED:
                trainer.save_checkpoint(path)

    module = Tiny()
    make_trainer(2, 2, 2, STEPS, callbacks=[Save()]).fit(module)
    return module.losses


def resume(world: int, ep: int, stage: int, path: str) -> tuple[list[float], int]:
    """This rank's losses after the checkpoint, and the batches seen."""
    pl.seed_everything(2, verbose=False)
    module = Tiny()
    make_trainer(world, ep, stage, STEPS).fit(module, ckpt_path=path)
    return module.losses, int(module.steps_seen)
