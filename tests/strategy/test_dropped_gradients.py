"""Gradients of an unfinished accumulation that are dropped, at every stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.models import Case, Net
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor

# No balancing losses: they would count for micro-batches whose loss is multiplied by zero.
CASE = Case(world=2, ep=2, accumulate=3, steps=3, batches_per_epoch=7, coefficients=(0.0, 0.0))
CASES = {
    "1": replace(CASE, stage=1),
    "2": replace(CASE, stage=2),
    "2, bf16": replace(CASE, stage=2, precision="bf16-mixed"),
    "2, offloaded": replace(CASE, stage=2, extra={"offload_optimizer": True}),
    "3": replace(CASE, stage=3),
}


class Weighted(Net):
    """The loss of one micro-batch counts for nothing."""

    def __init__(self, case: Case, ignored: int | None = None) -> None:
        super().__init__(case)
        self.ignored = ignored

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0.0 if batch_idx == self.ignored else loss


class Clear(pl.Callback):
    """Clears gradients after a micro-batch, as anyone may in a hook."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.after:
            trainer.optimizers[0].zero_grad()


class Stop(pl.Callback):
    """Ends a run in the middle of an accumulation, as a Timer does."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 4:
            trainer.should_stop = True


def fit(module: Net, **options: Any) -> dict[str, Tensor]:
    make_trainer(module.case, **options).fit(module)
    return whole_weights(module.net)


def seeded(kind: type[Net], *args: Any) -> Any:
    pl.seed_everything(7, verbose=False)
    return kind(*args)


def cleared(case: Case) -> tuple[dict[str, Tensor], ...]:
    """Weights where the first micro-batch of the second step is cleared, ignored, and counted."""
    found = fit(seeded(Weighted, case), callbacks=[Clear(3)])
    return found, fit(seeded(Weighted, case, 3)), fit(seeded(Weighted, case))


def stopped(case: Case, path: str) -> dict[str, Tensor]:
    """Weights of a run that ended within a step and went on with the next epoch."""
    module = seeded(Weighted, case)
    trainer = make_trainer(case, callbacks=[Stop()], max_epochs=1)
    trainer.fit(module)
    trainer.save_checkpoint(path)
    module = seeded(Weighted, case)
    make_trainer(case, max_epochs=2).fit(module, ckpt_path=path)
    return whole_weights(module.net)


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_zero_grad_drops_micro_batches(rank_pool, name):
    case = CASES[name]
    for found, right, wrong in rank_pool.run(cleared, 2, case, timeout=100):
        assert_same(found, right, 1e-6 if case.precision == "32-true" else 4e-4)
        apart = [float((found[n] - w).abs().max()) for n, w in wrong.items()]
        assert max(apart) > 1e-3, "the micro-batch matters"


@pytest.mark.parametrize("name", ["2", "2, offloaded", "3"])
def test_a_step_that_a_run_did_not_finish_is_not_in_the_next_epoch(rank_pool, tmp_path, name):
    """Stage 1 keeps gradients where torch does."""
    paths = [str(tmp_path / one) for one in ("1", name)]
    right, found = (
        rank_pool.run(stopped, 2, CASES[one], path, timeout=100)
        for one, path in zip(("1", name), paths, strict=True)
    )
    for rank in range(2):
        assert_same(found[rank], right[rank], 1e-6)


def resumed(case: Case, path: str, accumulate: int) -> tuple[str, str]:
    """What resuming says in the middle of a step, with that and with the same accumulation."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if args[-1] == 1:
                trainer.save_checkpoint(path)

    make_trainer(case, callbacks=[Save()]).fit(seeded(Weighted, case))
    said = []
    for number in (accumulate, case.accumulate):
        trainer = make_trainer(replace(case, accumulate=number))
        try:
            trainer.fit(seeded(Weighted, case), ckpt_path=path)
        except Exception as error:  # noqa: BLE001
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")
    return said[0], said[1]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_is_not_finished_with_another_accumulation(rank_pool, tmp_path, accumulate):
    path = str(tmp_path / "middle")
    for refused, same in rank_pool.run(resumed, 2, CASE, path, accumulate, timeout=100):
        assert refused.startswith("CheckpointError: The checkpoint was saved in the middle of a")
        assert f"accumulate_grad_batches={accumulate}" in refused
        assert same == "nothing"
