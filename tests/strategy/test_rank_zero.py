"""The model run for rank 0 alone: the other ranks lend their experts, and training goes on."""

from __future__ import annotations

import pytest
import torch
from strategy import waiting_runs as runs
from strategy.models import Case, Net


@pytest.mark.parametrize(
    ("world", "ep", "precision"),
    [(2, 2, "32-true"), (2, 2, "bf16-mixed"), (2, 1, "32-true"), (4, 2, "32-true")],
)
def test_rank_zero_draws_what_the_whole_model_says(rank_pool, world, ep, precision):
    results = rank_pool.run(runs.draws, world, world, ep, 2, precision, runs.three_passes)
    undisturbed = rank_pool.run(runs.draws, world, world, ep, 2, precision, None)
    for rank, (result, expected) in enumerate(zip(results, undisturbed, strict=True)):
        assert result["error"] == ("nothing", ""), result["error"]
        assert result["losses"] == expected["losses"], "training has changed"
        assert result["modes"] == expected["modes"]
        assert len(set(result["modes"])) == 2, "modes are restored one by one"
        if rank:
            assert result["drawn"] == [None, None]
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    whole = Net(Case()).to(dtype)
    for drawn, step in zip(results[0]["drawn"], (1, 3), strict=True):
        whole.net.load_state_dict(results[0]["weights"][step], strict=True)
        for found, tokens in zip(drawn, (1, 3, 0), strict=True):
            with torch.no_grad():
                right = runs.residual(whole, runs.sample_input(tokens))
            assert found.dtype == dtype
            torch.testing.assert_close(found, right)


def test_an_error_of_the_function_is_an_error_on_all_ranks(rank_pool):
    first, second = rank_pool.run(runs.draws, 2, 2, 2, 2, "32-true", runs.fails_on_rank_zero)
    assert first["error"] == ("KeyError", "'no such prompt'")
    kind, message = second["error"]
    assert kind == "ExchangeError"
    assert "failed on rank 0: KeyError: 'no such prompt'" in message


def test_training_on_rank_zero_alone_is_refused(rank_pool):
    first, second = rank_pool.run(runs.draws, 2, 2, 2, 2, "32-true", runs.trains_on_rank_zero)
    assert first["error"][0] == "ConfigError"
    assert "without gradients" in first["error"][1]
    assert second["error"][0] == "ExchangeError"


def test_stage_3_is_refused_on_all_ranks(rank_pool):
    for result in rank_pool.run(runs.draws, 2, 2, 2, 3, "32-true", runs.three_passes):
        assert result["error"][0] == "ConfigError"
        assert "does not work at stage 3" in result["error"][1]
