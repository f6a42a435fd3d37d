"""What a user's own program prints under the strategy: nothing that nobody can act on."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy, MoE
from lightning_fastmoe.strategy.quiet import quiet_warnings


class Small(pl.LightningModule):
    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            self.moe, self.head = MoE(8, 16, num_experts=4, top_k=2), nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 0:
            text = "`isinstance(treespec, LeafSpec)` is deprecated: the user's own"
            warnings.warn(text, stacklevel=1)
            out = torch.empty(2)
            dist.all_gather_into_tensor(out, torch.ones(1))
        loss = self.head(self.moe(batch)).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.head(self.moe(batch)).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def printed(folder: str) -> str:
    """What this rank writes to its standard output and error, below Python too."""
    path = Path(folder) / f"rank_{os.environ['RANK']}"
    kept = [os.dup(1), os.dup(2)]
    with path.open("w") as file, warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            train(folder)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, old in zip((1, 2), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
    return path.read_text()


def train(folder: str) -> None:
    """A user's program: fits, saves and validates."""
    data = DataLoader(torch.randn(8, 3, 8), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=FastMoEStrategy(stage=3),
        default_root_dir=folder,
    )
    trainer.fit(Small(), data, data)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    trainer.validate(Small(), data, ckpt_path=f"{folder}/last.ckpt")


NOISE = (
    "Tip:",
    "initializing deepspeed",
    "Enabling DeepSpeed",
    "untested optimizer",
    "weights_only",
    "DistributedSampler",
    "reduce_scatter_tensor",
    "utilities/_pytree.py",
)


def warns_of_collectives() -> bool:
    """Whether this version of torch has deprecated the one that :class:`Small` calls."""
    return "is deprecated" in inspect.getsource(dist.all_gather_into_tensor)


def test_a_program_of_two_ranks(rank_pool, tmp_path) -> None:
    for text in rank_pool.run(printed, 2, str(tmp_path)):
        assert [line for line in text.splitlines() if any(noise in line for noise in NOISE)] == []
        # The user's own: one about the same thing, and one call of an old collective.
        assert text.count("UserWarning: `isinstance(treespec, LeafSpec)` is deprecated") == 1
        collective = "`torch.distributed.all_gather_into_tensor` is deprecated"
        assert text.count(collective) == warns_of_collectives()


def test_filters_are_those_from_before_when_a_run_is_over() -> None:
    before = list(warnings.filters)
    undo = quiet_warnings()
    assert len(warnings.filters) == len(before) + 2
    undo()
    undo()
    assert list(warnings.filters) == before
