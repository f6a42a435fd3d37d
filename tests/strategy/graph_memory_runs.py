"""What each rank does for test_graph_memory.py."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy, MoE
from lightning_fastmoe.zero import graph_memory


class Graphs:
    """Overwrites what a micro-batch has left where autograd put it, as CUDA graphs do."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.times = 0

    def see(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not hasattr(gradient, graph_memory._KEPT):
            self.left.append(gradient)

    def begin(self) -> None:
        self.times += 1
        for gradient in self.left:
            gradient.detach().fill_(torch.nan)
        self.left.clear()


class Model(pl.LightningModule):
    def __init__(self, graphs: Graphs | None) -> None:
        super().__init__()
        self.graphs = graphs
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.moe = MoE(8, 12, 4, top_k=2)

    def on_fit_start(self) -> None:
        if self.graphs is not None:
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(self.graphs.see)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        y: Tensor = self.last(self.moe(self.first(batch)))
        return (y - batch.sum(-1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.moe(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(
    world: int, stage: int, experts: int, precision: Any, overwrites: bool
) -> tuple[list[Any], int]:
    """Two steps of three micro-batches, with a validation in the middle of one.

    Returns:
        The weights of this rank, and how often graphs took their memory again.
    """
    pl.seed_everything(0, verbose=False)
    graphs = Graphs() if overwrites else None
    model = Model(graphs)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(stage=stage, expert_parallel_size=experts),
        precision=precision,
        max_epochs=1,
        use_distributed_sampler=False,
        accumulate_grad_batches=3,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = list(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)))
    loaders = DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None)
    with (
        patch.object(graph_memory, "_are_there_graphs", lambda: graphs is not None),
        patch.object(torch.compiler, "cudagraph_mark_step_begin", graphs and graphs.begin),
    ):
        trainer.fit(model, *loaders)
    weights = [p.detach().float().tolist() for p in model.parameters()]
    return weights, 0 if graphs is None else graphs.times
