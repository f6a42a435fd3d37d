"""What the ranks run in test_partial_state.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import Case, Net
from strategy.tracing import make_trainer
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed import ExpertDataParallel


def said_by(use: Any) -> list[str]:
    """What is warned of state dicts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    return [str(w.message) for w in caught if "state_dict()" in str(w.message)]


def of_a_run(case: Case, directory: str) -> dict[str, list[str]]:
    """Of training that saves, of using the module after it, and of a copy."""
    pl.seed_everything(7, verbose=False)
    module = Net(case)
    keep = ModelCheckpoint(directory, save_last=True)
    trainer = make_trainer(case, callbacks=[keep], enable_checkpointing=True)
    return {
        "saving": said_by(lambda: trainer.fit(module)),
        "module": said_by(module.state_dict),
        "a part": said_by(module.net["moes"][1].experts.state_dict),
        "head": said_by(module.net["head"].state_dict),
    }


def of_a_plain_loop() -> dict[str, list[str]]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, 10, 4))
    parallel = ExpertDataParallel(model, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "full": said_by(parallel.full_state_dict),
        "optimizer": said_by(lambda: parallel.full_optimizer_state_dict(optimizer)),
        "model": said_by(model.state_dict),
    }
