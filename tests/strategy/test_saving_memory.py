"""A save needs buffers, not a copy of the state, in any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from saving.meter import begin_anew, resident
from strategy.models import Case
from strategy.tracing import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE

D_MODEL, D_FFN, EXPERTS = 512, 640, 16


class Large(pl.LightningModule):
    """Experts and a dense layer of as many parameters, two times ten million."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(D_MODEL, D_FFN, EXPERTS, top_k=2, activation="gelu")
        self.dense = nn.Linear(D_MODEL, 2 * D_FFN * EXPERTS, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.dense(self.moe(batch)).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(2, 4, D_MODEL), batch_size=None)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def rise_during_a_save(case: Case, directory: str) -> tuple[int, int]:
    """How far a rank's memory rose, and the bytes of the state that it has."""
    trainer = make_trainer(case, gradient_clip_val=None)
    trainer.fit(Large())
    zero = trainer.strategy.deepspeed_engine.optimizer
    flats = [t for s in zero.optimizer.state.values() for t in s.values() if t.numel() > 1]
    own = sum(flat.nbytes for flat in flats) * 3 // 2  # two states of AdamW, and the weights
    before = begin_anew()
    trainer.save_checkpoint(directory)
    return resident("VmHWM") - before, own


STATE = 12 * 4 * D_MODEL * D_FFN * EXPERTS
"""Bytes: weights and two states in fp32, of experts and as many others."""
LIMIT = 60_000_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_hardly_rises(rank_pool, tmp_path, stage):
    case = Case(world=2, ep=2, stage=stage, steps=2)
    path = tmp_path / "a.ckpt"
    results = rank_pool.run(rise_during_a_save, 2, case, str(path))
    saved = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
    assert saved == pytest.approx(STATE, rel=0.01)
    for rise, own in results:
        assert own == pytest.approx(STATE / 2, rel=0.01)
        assert own > 2 * LIMIT
        assert rise < LIMIT
