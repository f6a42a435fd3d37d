"""What the ranks run in test_leaf_modules.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from huggingface.lora_runs import Adapted, WeightsByEpoch
from huggingface.sharding_runs import Run, Tuned
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import FastMoEError


def adapters_after_training(run: Run) -> list[dict[str, Tensor]]:
    """The weights after each step; no module is a leaf of ZeRO 3."""
    module, weights = Adapted(run), WeightsByEpoch()
    options = {"max_steps": -1, "max_epochs": run.steps, "reload_dataloaders_every_n_epochs": 1}
    make_trainer(run, callbacks=[weights], **options).fit(module)
    assert not any(z3_leaf_module(part) for part in module.modules())
    return weights.weights


class Leaf(Tuned):
    """Calls DeepSpeed's function, as instructions for ZeRO 3 say."""

    def configure_model(self) -> None:
        super().configure_model()
        set_z3_leaf_modules(self.net, [type(self.net.model.layers[0].mlp)])


def error(run: Run, by_config: bool) -> str:
    """Of training with a leaf module that has experts."""
    module = Tuned(run) if by_config else Leaf(run)
    trainer = make_trainer(run)
    if by_config:
        trainer.strategy.config["zero_optimization"]["leaf_module"] = {
            "name_suffixes": ["layers.1.mlp"]
        }
    try:
        trainer.fit(module)
    except FastMoEError as found:
        return f"{type(found).__name__}: {found}"
    return ""


class Turns(nn.Module):
    """Two linear layers, of which each batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        out: Tensor = self.both[which](x)
        return out


class WithTurns(pl.LightningModule):
    """A leaf module without experts of this package, behind a layer that may be frozen."""

    def __init__(self, frozen: bool = False, keyword: bool = False) -> None:
        super().__init__()
        self.keyword = keyword
        torch.manual_seed(0)
        self.net = nn.ModuleDict(
            {
                "first": nn.Linear(8, 8),
                "turns": Turns(),
                "moe": MoE(8, 8, 2, load_balancing=0.0, z_loss=0.0),
            }
        )
        self.net["first"].requires_grad_(not frozen)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        x = self.net["first"](x)
        turns, which = self.net["turns"], batch_idx % 2
        x = turns(x=x, which=which) if self.keyword else turns(x, which)
        return self.net["moe"](x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01, eps=1e-3)

    def train_dataloader(self) -> Any:
        torch.manual_seed(1)
        return DataLoader([torch.randn(4, 8) for _ in range(4)], batch_size=None)


def other_leaf(
    run: Run, frozen: bool = False, keyword: bool = False, evaluating: bool = False
) -> dict[str, Tensor] | str:
    """The weights after training, or the error."""
    module = WithTurns(frozen, keyword)
    set_z3_leaf_modules(module, [Turns])
    module.net["turns"].train(not evaluating)
    try:
        make_trainer(run).fit(module)
    except FastMoEError as found:
        return f"{type(found).__name__}: {found}"
    return whole_weights(module.net)


def other_leaf_reference(run: Run) -> dict[str, Tensor]:
    """The weights after training in a plain loop."""
    module = WithTurns()
    optimizer = module.configure_optimizers()
    batches = list(module.train_dataloader())
    for step in range(run.steps):
        optimizer.zero_grad()
        for n in range(step * run.accumulate, (step + 1) * run.accumulate):
            (module.training_step(batches[n], n) / run.accumulate).backward()
        nn.utils.clip_grad_norm_(module.parameters(), run.clip)
        optimizer.step()
    return {name: p.detach() for name, p in module.net.named_parameters()}
