"""One row per (token, rank): what is sent, repeated runs, several passes, ranks that disagree."""

from __future__ import annotations

import pytest
import torch
from distributed import dedup_runs as runs

NAMES = ["dedup", "dedup_overlapped"]


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


def test_halves_send_no_more_than_the_whole(rank_pool):
    for sent, pairs, _ in rank_pool.run(runs.rows_sent, 2, "dedup_overlapped"):
        assert len(sent) == 12
        for phase in {phase for phase, _, _ in sent}:
            rows = [send for name, row, send in sent if name == phase and row == runs.D * 8]
            assert len(rows) == 2
            assert 0 < sum(rows[0]) < sum(map(sum, rows))
            if phase in ("dispatch", "combine (backward)"):
                assert [sum(each) for each in zip(*rows, strict=True)] == pairs


def test_one_half_is_under_way_while_the_experts_compute_the_other(rank_pool):
    for forward, backward in rank_pool.run(runs.order_of_work, 2):
        assert forward == [
            *["start dispatch"] * 4,
            *["finish dispatch"] * 2,
            "experts",
            "start combine",
            *["finish dispatch"] * 2,
            "experts",
            "start combine",
            *["finish combine"] * 2,
        ]
        assert backward == [
            *["start combine"] * 2,
            "finish combine",
            "experts",
            *["start dispatch"] * 2,
            "finish combine",
            "experts",
            *["start dispatch"] * 2,
            *["finish dispatch"] * 4,
        ]


def test_all_to_all_sends_one_per_choice(rank_pool):
    """What the numbers above are compared with."""
    for sent, _, choices in rank_pool.run(runs.rows_sent, 2, "all_to_all"):
        assert sent[0] == ("dispatch", runs.D * 8, choices)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(rank_pool, name, dtype):
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for values, right in rank_pool.run(runs.repeated, 2, name, dtype):
        for other in values[1:]:
            for a, b in zip(values[0], other, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(values[0], right, strict=True):
            assert float((a.double() - b).norm()) <= bound * float(b.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["twice", "two graphs", "checkpointed"])
def test_several_passes_through_one_layer(rank_pool, name, how):
    for tensors in rank_pool.run(runs.steps, 2, name, how):
        for what, (found, right) in tensors.items():
            torch.testing.assert_close(
                found, right, rtol=1e-10, atol=1e-10, msg=lambda m, n=what: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_raises_is_waited_for_until_the_deadline(rank_pool, name):
    first, second = rank_pool.run(runs.faults, 2, name, "a rank raises")
    assert second == "raised"
    assert first.startswith("a layer, exchange of tokens number 1, phase counts: rank 0 has waited")


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_backward_is_waited_for_until_the_deadline(rank_pool, name):
    first, _ = rank_pool.run(runs.faults, 2, name, "no backward")
    assert "phase combine (backward): rank 0 has waited" in first


@pytest.mark.parametrize("name", NAMES)
def test_ranks_in_other_layers_are_an_error_on_all(rank_pool, name):
    for error in rank_pool.run(runs.faults, 2, name, "other layers"):
        assert "Every rank must run the same MoE layers" in error


def test_a_layer_with_capacity_and_router_equals_all_to_all(rank_pool):
    for found in rank_pool.run(runs.layers, 2, [*NAMES, "all_to_all"]):
        right = found["all_to_all"]
        assert float(right["dropped"].sum()) > 0
        for name in NAMES:
            assert found[name].keys() == right.keys()
            for key, value in found[name].items():
                torch.testing.assert_close(value, right[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_rounds_once_more_than_one_rank(rank_pool, name):
    for tensors in rank_pool.run(runs.on_device, 2, name, "cpu"):
        for found, right in tensors:
            assert float((found.double() - right).norm()) <= 6e-3 * float(right.norm())
