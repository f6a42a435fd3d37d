"""Lightning's other strategies scale losses without telling the layers: noticed, not silent."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy, MoE, moe_losses
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import scaled_loss

DATA = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(0))


class Model(pl.LightningModule):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        torch.manual_seed(1)
        self.first = nn.Linear(8, 8)
        weight = 0.0 if way == "off" else 0.5
        self.moe = MoE(8, 12, 4, top_k=2, load_balancing=weight, z_loss=weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.first(batch)
        if self.way in ("reentrant", "checkpoint"):
            y: Tensor = checkpoint(self.moe, x, use_reentrant=self.way == "reentrant")
        else:
            y = self.moe(x)
        loss = (y - batch.sin()).square().mean()
        if self.way == "by hand":
            loss = loss + sum(moe_losses(self).values())
        if self.way == "watched":
            self.moe.loss_scale.watch(loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Renamed(Model):
    """Its step is defined by another name."""

    def shared_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        y: Tensor = self.moe(self.first(batch))
        return (y - batch.sin()).square().mean()

    training_step = shared_step


def fit(way: str, accumulate: int, strategy: Any = "auto") -> Tensor:
    model = Renamed(way) if way == "renamed" else Model(way)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(list(DATA), batch_size=None))
    return model.moe.router.weight.detach().clone()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("way", ["plain", "renamed", "reentrant", "checkpoint"])
def test_accumulation_is_noticed(way: str) -> None:
    with pytest.raises(ConfigError, match=r"by accumulate_grad_batches=4 .*moe_losses"):
        fit(way, 4)


@pytest.mark.parametrize("way", ["by hand", "watched"])
def test_ways_that_are_right(way: str) -> None:
    right = fit("plain", 4, FastMoEStrategy())
    torch.testing.assert_close(fit(way, 4), right, rtol=1e-5, atol=1e-6)
    without = fit("off", 4)
    assert not torch.allclose(without, right, rtol=1e-3)


@pytest.mark.parametrize(("way", "accumulate"), [("plain", 1), ("off", 4)])
def test_nothing_to_scale(way: str, accumulate: int) -> None:
    fit(way, accumulate)


@pytest.mark.parametrize(
    ("precision", "strategy", "found"),
    [
        ("16-mixed", "SingleDeviceStrategy", "precision='16-mixed'"),
        ("16-true", "DeepSpeedStrategy", "precision='16-true'"),
        ("16-true", "SingleDeviceStrategy", None),
        ("bf16-mixed", "DeepSpeedStrategy", None),
        ("16-mixed", "FastMoEStrategy", None),
    ],
)
def test_loss_scaling_of_fp16(precision: str, strategy: str, found: str | None) -> None:
    class Asks(pl.LightningModule):
        def training_step(self, call: Callable[[], str | None]) -> str | None:
            return call()

    module = Asks()
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1, precision=precision, strategy=type(strategy, (), {})()
    )
    said = module.training_step(scaled_loss.hidden_scale)
    assert (said is None) if found is None else (found in said)  # type: ignore[operator]
    assert scaled_loss.hidden_scale() is None
