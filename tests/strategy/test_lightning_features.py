"""What docs/lightning_features.md says that works, does; what is refused is in test_refusals.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy.lightning_runs import scheduled_reference, trained, with_a_graph
from strategy.models import Case

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
