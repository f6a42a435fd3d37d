"""What docs/lightning_features.md says that works, does; what is refused is in test_refusals.py."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from strategy.models import Case, Net, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor

Weights = dict[str, Tensor]


class Plain(Net):
    """The network with a plain optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Plain):
    """Steps by hand."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class Schedule(pl.Callback):
    """Accumulates as many batches as the number of the epoch, counted from 1."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.accumulate_grad_batches = trainer.current_epoch + 1


def trained(case: Case, kind: str) -> Weights:
    """The weights after training with one feature."""
    pl.seed_everything(7, verbose=False)
    module = Manual(case) if kind == "manual" else Plain(case)
    callbacks = [Schedule()] if kind == "schedule" else []
    make_trainer(case, callbacks=callbacks, gradient_clip_val=None).fit(module)
    assert module.net is not None
    return whole_weights(module.net)


def with_a_graph(case: Case, folder: str) -> tuple[bool, list[str]]:
    """Whether training with a logger of graphs came to its end, and what was warned of."""
    pl.seed_everything(7, verbose=False)
    module = Plain(case)
    module.example_input_array = make_batches(case)[0, 0, 0]
    logger = TensorBoardLogger(folder, log_graph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(case, logger=logger, gradient_clip_val=None)
        trainer.fit(module)
    texts = [str(warning.message) for warning in caught]
    return trainer.state.finished, [text for text in texts if "log_graph" in text]


def scheduled_reference(case: Case) -> Weights:
    """One process in plain PyTorch: epoch i accumulates i batches, the last ones fewer."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = make_batches(case).flatten(0, 1)[: case.batches_per_epoch]
    for epoch in range(case.epochs):
        for chunk in batches.split(epoch + 1):
            optimizer.zero_grad()
            for batch in chunk.flatten(0, 1):
                (loss_of(net, batch) / (epoch + 1) / case.world).backward()
            optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


CASE = Case(world=2, ep=2, coefficients=(0.0, 0.0))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_manual_optimization_equals_automatic(stage: int, rank_pool) -> None:
    case = replace(CASE, stage=stage)
    automatic = rank_pool.run(trained, 2, case, "automatic")
    for expected, weights in zip(automatic, rank_pool.run(trained, 2, case, "manual"), strict=True):
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_that_changes_between_epochs(stage: int, rank_pool) -> None:
    case = replace(CASE, stage=stage, steps=3, batches_per_epoch=3, epochs=3)
    expected = scheduled_reference(case)
    for weights in rank_pool.run(trained, 2, case, "schedule"):
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_a_logger_of_graphs_warns_once_and_leaves_ranks_together(rank_pool, tmp_path) -> None:
    (first, warned), (second, silent) = rank_pool.run(with_a_graph, 2, CASE, str(tmp_path))
    assert first
    assert second
    assert len(warned) == 1
    assert "log_graph=True" in warned[0]
    assert silent == []
