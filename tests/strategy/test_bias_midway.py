"""What routers have counted in a half accumulated step counts when training resumes in it."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.midway_runs import BATCHES, EPOCHS, Batches
from strategy.models import D_IN, D_MODEL, Case
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE, RouterBiasBalancing


class Biased(pl.LightningModule):
    """One layer whose router has a bias."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.embed = nn.Linear(D_IN, D_MODEL)
        self.moe = MoE(D_MODEL, 20, 4, top_k=2, router="sigmoid", load_balancing=0.0)
        self.head = nn.Linear(D_MODEL, 1)
        self.poison = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.poison:
            batch = batch * torch.nan
        h = self.embed(batch)
        return (self.head(h + self.moe(h)) - batch.sum(-1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, self.case.world, 0.0)


class Save(pl.Callback):
    """Saves after so many batches; notes what was counted then, and when training starts."""

    def __init__(self, saves: dict[int, str]) -> None:
        self.saves, self.batches = saves, 0
        self.counts: list[list[int]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.counts.append(pl_module.moe.router.load_since_update.tolist())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches in self.saves:
            self.counts.append(pl_module.moe.router.load_since_update.tolist())
            trainer.save_checkpoint(self.saves[self.batches])


def fit(
    case: Case, saves: dict[int, str], path: str | None = None, poison: int = -1
) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """The biases and weights in the end, and counts. The saves come before the biases move."""
    pl.seed_everything(7, verbose=False)
    module = Biased(case)
    module.poison = poison
    save = Save(saves)
    trainer = make_trainer(
        case,
        max_epochs=EPOCHS,
        max_steps=-1,
        gradient_clip_val=None,
        callbacks=[save, RouterBiasBalancing(0.05)],
    )
    trainer.fit(module, ckpt_path=path)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == BATCHES * EPOCHS
    return module.moe.router.balance_bias, whole_weights(module), save.counts


def fit_error(case: Case, path: str) -> str:
    """The error of a run that resumes in a step of which a part was not finite."""
    try:
        fit(case, {}, path)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "no error"


def poisoned(case: Case, path: str) -> str:
    """The error of a run in whose step a part is not finite; saved after that part."""
    try:
        fit(case, {2: path}, poison=0)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "no error"


SAVES = {
    2: "in the first step",
    3: "after a step, before its biases move",
    11: "in the second epoch",
}


def case_of(world: int, ep: int, stage: int) -> Case:
    return Case(world, ep, stage, accumulate=3)


@pytest.mark.parametrize("case", [case_of(2, 2, 1), case_of(2, 1, 2), case_of(2, 2, 3)])
def test_on_the_same_ranks_no_bit_changes(rank_pool, tmp_path, case):
    paths = {n: str(tmp_path / f"{n}.ckpt") for n in SAVES}
    bias, weights, _ = rank_pool.run(fit, 2, case, paths)[0]
    assert len(set(bias.tolist())) > 1
    for n, path in paths.items():
        for again, rest, _ in rank_pool.run(fit, 2, case, {}, path):
            assert torch.equal(again, bias), n
            for name, weight in weights.items():
                assert torch.equal(rest[name], weight), (n, name)


@pytest.mark.parametrize(("before", "after"), [((2, 2, 2), (1, 1, 2)), ((1, 1, 1), (2, 2, 3))])
def test_on_other_ranks_all_counts_count(rank_pool, tmp_path, before, after):
    path = str(tmp_path / "2.ckpt")
    before, after = case_of(*before), case_of(*after)
    straight = rank_pool.run(fit, before.world, before, {2: path})
    resumed = rank_pool.run(fit, after.world, after, {}, path)

    def total(results, which):
        return [sum(counts) for counts in zip(*(r[2][which] for r in results), strict=True)]

    assert sum(total(straight, 1)) == 2 * 2 * 4 * 5  # batches, K, samples, tokens
    assert total(resumed, 0) == total(straight, 1)
    for again, _, _ in resumed:
        assert torch.equal(again, straight[0][0])


def test_nan_that_a_router_saw_before_the_save_still_stops_the_step(rank_pool, tmp_path):
    case, path = case_of(2, 2, 2), str(tmp_path / "2.ckpt")
    for error in rank_pool.run(poisoned, 2, case, path):
        assert error.startswith("NonFiniteError: NaN or Inf reached the router of moe")
    for error in rank_pool.run(fit_error, 2, case, path):
        assert error.startswith("NonFiniteError: NaN or Inf reached the router of moe")
