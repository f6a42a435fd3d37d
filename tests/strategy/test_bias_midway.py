"""What routers have counted in a half accumulated step counts when training resumes in it."""

from __future__ import annotations

import pytest
import torch
from strategy import bias_runs as runs
from strategy.models import Case

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
    bias, weights, _ = rank_pool.run(runs.fit, 2, case, paths)[0]
    assert len(set(bias.tolist())) > 1
    for n, path in paths.items():
        for again, rest, _ in rank_pool.run(runs.fit, 2, case, {}, path):
            assert torch.equal(again, bias), n
            for name, weight in weights.items():
                assert torch.equal(rest[name], weight), (n, name)


@pytest.mark.parametrize(("before", "after"), [((2, 2, 2), (1, 1, 2)), ((1, 1, 1), (2, 2, 3))])
def test_on_other_ranks_all_counts_count(rank_pool, tmp_path, before, after):
    path = str(tmp_path / "2.ckpt")
    before, after = case_of(*before), case_of(*after)
    straight = rank_pool.run(runs.fit, before.world, before, {2: path})
    resumed = rank_pool.run(runs.fit, after.world, after, {}, path)

    def total(results, which):
        return [sum(counts) for counts in zip(*(r[2][which] for r in results), strict=True)]

    assert sum(total(straight, 1)) == 2 * 2 * 4 * 5  # batches, K, samples, tokens
    assert total(resumed, 0) == total(straight, 1)
    for again, _, _ in resumed:
        assert torch.equal(again, straight[0][0])


def test_nan_that_a_router_saw_before_the_save_still_stops_the_step(rank_pool, tmp_path):
    case, path = case_of(2, 2, 2), str(tmp_path / "2.ckpt")
    for error in rank_pool.run(runs.poisoned, 2, case, path):
        assert error.startswith("NonFiniteError: NaN or Inf reached the router of moe")
    for error in rank_pool.run(runs.fit_error, 2, case, path):
        assert error.startswith("NonFiniteError: NaN or Inf reached the router of moe")
