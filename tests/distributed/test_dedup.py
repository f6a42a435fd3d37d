"""One row per (token, rank): what is sent, repeated runs, several passes, ranks that disagree."""

from __future__ import annotations

import pytest
import torch
from distributed import dedup_runs as runs


@pytest.mark.parametrize("world", [2, 4])
def test_each_token_is_sent_once_to_each_rank_that_holds_some_of_its_experts(rank_pool, world):
    for sent, pairs, choices in rank_pool.run(runs.rows_sent, world, "dedup"):
        # Ids of 4 and weights of 8 bytes per slot, then the tokens themselves.
        out = [("dispatch", 3 * 12, pairs), ("dispatch", runs.D * 8, pairs)]
        assert sent[:2] == out
        assert [(phase, row) for phase, row, _ in sent[2:]] == [
            ("combine", runs.D * 8),
            ("combine (backward)", runs.D * 8),
            ("dispatch (backward)", 3 * 8),
            ("dispatch (backward)", runs.D * 8),
        ]
        assert sent[3][2] == pairs
        assert sum(pairs) < sum(choices)


def test_all_to_all_sends_one_per_choice(rank_pool):
    """What the numbers above are compared with."""
    for sent, _, choices in rank_pool.run(runs.rows_sent, 2, "all_to_all"):
        assert sent[0] == ("dispatch", runs.D * 8, choices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(rank_pool, dtype):
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for values, right in rank_pool.run(runs.repeated, 2, dtype):
        for other in values[1:]:
            for a, b in zip(values[0], other, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(values[0], right, strict=True):
            assert float((a.double() - b).norm()) <= bound * float(b.norm())


@pytest.mark.parametrize("how", ["twice", "two graphs", "checkpointed"])
def test_several_passes_through_one_layer(rank_pool, how):
    for tensors in rank_pool.run(runs.steps, 2, how):
        for name, (found, right) in tensors.items():
            torch.testing.assert_close(
                found, right, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_rank_that_raises_is_waited_for_until_the_deadline(rank_pool):
    first, second = rank_pool.run(runs.faults, 2, "a rank raises")
    assert second == "raised"
    assert first.startswith("a layer, exchange of tokens number 1, phase counts: rank 0 has waited")


def test_a_rank_without_backward_is_waited_for_until_the_deadline(rank_pool):
    first, _ = rank_pool.run(runs.faults, 2, "no backward")
    assert "phase combine (backward): rank 0 has waited" in first


def test_ranks_in_other_layers_are_an_error_on_all(rank_pool):
    for error in rank_pool.run(runs.faults, 2, "other layers"):
        assert "Every rank must run the same MoE layers" in error


def test_a_layer_with_capacity_and_router_equals_all_to_all(rank_pool):
    for found in rank_pool.run(runs.layers, 2, ["dedup", "all_to_all"]):
        right = found["all_to_all"]
        assert found["dedup"].keys() == right.keys()
        assert float(right["dropped"].sum()) > 0
        for name, value in found["dedup"].items():
            torch.testing.assert_close(value, right[name], rtol=1e-12, atol=1e-12)
