"""Nothing of a Trainer's life stays in the process once its objects are dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy.many_fits_runs import before, left, save_after_another
from strategy.models import Case

CASE = Case(world=2, ep=2, steps=1)
LIVES = ("fit", "training_step", "configure_optimizers", "engine", "refused", "validate")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_functions_of_torch_are_put_back(stage: int, rank_pool) -> None:
    assert rank_pool.run(before, 2, replace(CASE, stage=stage)) == [True, True]


@pytest.mark.parametrize("how", [*LIVES, "test", "predict"])
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_stays(stage: int, how: str, rank_pool) -> None:
    """Neither descriptors, threads, groups, engines, modules nor patches."""
    for before_all, first, later in rank_pool.run(left, 2, replace(CASE, stage=stage), how):
        assert first[2:5] == before_all[2:5]
        assert later[2:-1] == first[2:-1]
        # Groups of the cases before may end in between; gloo's threads do so a moment later.
        assert later[:2] <= first[:2]
        assert later[-1] <= first[-1] + 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_first_trainer_can_still_save(stage: int, tmp_path: Path, rank_pool) -> None:
    case = replace(CASE, stage=stage)
    for weights, loaded in rank_pool.run(save_after_another, 2, case, str(tmp_path)):
        assert weights.keys() == loaded.keys()
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), name
