"""What the strategy says about an optimizer that it accepts, and a config that it doesn't."""

from __future__ import annotations

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import nn, optim

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.strategy.checks import advise_fused, check_trainer, warn_of_float64

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Own(optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "fused": None})


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("optimizer", "device", "advised"),
    [
        (lambda: optim.AdamW(parameters()), CUDA, True),
        (lambda: optim.Adam(parameters(), foreach=True), CUDA, True),
        (lambda: optim.SGD(parameters(), lr=0.1, fused=False), CUDA, True),
        (lambda: optim.AdamW(parameters(), fused=True), CUDA, False),
        (lambda: optim.AdamW([{"params": parameters(), "fused": True}]), CUDA, False),
        (lambda: optim.AdamW(parameters()), CPU, False),
        (lambda: optim.RMSprop(parameters()), CUDA, False),  # has none that is fused
        (lambda: Own(parameters()), CUDA, False),  # means something of its own
    ],
)
def test_a_fused_optimizer_is_advised_where_there_is_one(optimizer, device, advised, caplog):
    made = optimizer()
    with caplog.at_level(logging.INFO):
        advise_fused(made, device)
    said = [record.getMessage() for record in caplog.records]
    assert [f"{type(made).__name__}(fused=True)" in text for text in said] == [True] * advised


@pytest.mark.parametrize(
    ("config", "precision", "refused"),
    [
        ({"bf16": {"enabled": True}}, "32-true", "bf16.enabled to True"),
        ({"bf16": {"enabled": False}}, "bf16-mixed", "bf16.enabled to False"),
        ({"fp16": {"enabled": True}}, "bf16-true", "fp16.enabled to True"),
        ({"bf16": {"enabled": True}}, "bf16-mixed", None),
        ({"bf16": {"enabled": True, "check_grad_overflow": True}}, "bf16-true", None),
        ({"bf16": {}, "fp16": {"enabled": False}}, "32-true", None),
        ({}, "bf16-mixed", None),
    ],
)
def test_a_config_of_another_precision_is_refused(config, precision, refused):
    """DeepSpeed would train in the config's."""
    strategy = FastMoEStrategy(config={"zero_optimization": {"stage": 2}, **config})
    options = {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision=precision, **options
    )
    if refused is None:
        check_trainer(trainer, pl.LightningModule())
        return
    with pytest.raises(ConfigError, match=f"{refused}.*precision='{precision}'"):
        check_trainer(trainer, pl.LightningModule())


def test_float64_is_cast_aloud():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with warnings.catch_warnings(action="error"):
        warn_of_float64(model, "32-true")
        model[1].double()
        with pytest.raises(UserWarning, match=r"^1.weight is float64. .*precision='32-true' casts"):
            warn_of_float64(model, "32-true")


def test_a_run_says_that_it_casts_float64():
    module = BoringModel().double()
    trainer = pl.Trainer(
        accelerator="cpu", strategy=FastMoEStrategy(), fast_dev_run=1, logger=False
    )
    with pytest.warns(UserWarning, match="layer.weight is float64"):
        trainer.validate(module, verbose=False)
    assert module.layer.weight.dtype == torch.float32
