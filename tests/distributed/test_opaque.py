"""Sharded experts as an operator in the graph of torch.compile: the bits of a graph with breaks."""

from __future__ import annotations

import pytest
import torch
from distributed import opaque_runs as runs

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS


def assert_equal(passes, tolerance=0.0):
    for i, values in enumerate(passes):
        assert any(v is not None and v.abs().sum() > 0 for v, _ in values.values()), i
        for name, (found, right) in values.items():
            assert (found is None) == (right is None), (i, name)
            if right is not None:
                torch.testing.assert_close(
                    *(found, right),
                    **{"rtol": tolerance, "atol": tolerance},
                    msg=lambda m, w=f"pass {i}, {name}": f"{w}: {m}",
                )


@pytest.mark.parametrize("dispatcher", ACROSS_RANKS)
def test_every_dispatcher_is_an_operator_with_the_same_bits(rank_pool, dispatcher):
    """Two layers and all numbers of tokens share a graph; a rank without tokens has another."""
    for rank, (passes, graphs, kept) in enumerate(
        rank_pool.run(runs.compared, 2, {"dispatcher": dispatcher}, timeout=200)
    ):
        assert_equal(passes)
        assert graphs == 1 + rank
        assert kept == 0


def test_a_pass_through_symmetric_memory_needs_no_autograd(rank_pool):
    for passes in rank_pool.run(runs.by_hand, 2, {"dispatcher": "symmetric"}, timeout=200):
        assert_equal(passes)


def test_ranks_run_a_compiled_model_as_often_as_each_likes(rank_pool):
    for rank, found in enumerate(rank_pool.run(runs.on_each_rank, 2, timeout=60)):
        assert len(found) == 2 - rank
        for compiled, plain in found:
            torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)


def test_rank_zero_runs_a_compiled_model_alone(rank_pool):
    found, nothing = rank_pool.run(runs.on_rank_zero, 2, timeout=60)
    assert (len(found), nothing) == (2, [])
    for compiled, plain in found:
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)


def test_backward_hooks_of_experts_run(rank_pool):
    for calls in rank_pool.run(runs.hooks_of_experts, 2, timeout=60):
        assert calls == [2, 2]


@pytest.mark.parametrize("setting", runs.SETTINGS)
def test_settings(rank_pool, setting):
    arguments = (runs.SETTINGS[setting], "cpu", "eager", torch.float64, None, (5, 11))
    for passes, graphs, kept in rank_pool.run(runs.compared, 2, *arguments, timeout=200):
        assert_equal(passes)
        assert (graphs, kept) == (1, 0)


def test_four_ranks_with_the_bits_of_one_process(rank_pool):
    """``exact=True`` holds in a graph, too."""
    arguments = ({"dispatcher": "dedup", "exact": True}, "cpu", "eager", torch.bfloat16, None, (8,))
    for passes, _, kept in rank_pool.run(runs.compared, 4, *arguments, timeout=200):
        assert_equal(passes)
        assert kept == 0


@pytest.mark.parametrize(("frozen", "backend"), [("router", "eager"), ("experts", "aot_eager")])
def test_frozen_parts_get_no_gradient(rank_pool, frozen, backend):
    arguments = ({}, "cpu", backend, torch.float64, frozen, (5,))
    for passes, _, kept in rank_pool.run(runs.compared, 2, *arguments, timeout=200):
        assert_equal(passes)
        missing = {name for name, (value, _) in passes[0].items() if value is None}
        assert {f".{name.split('.', 2)[2]}" for name in missing} == {
            "router": {".router.weight"},
            "experts": {".experts.up_proj", ".experts.down_proj"},
        }[frozen]
        assert kept == 0


@runs.needs_compiler
def test_inductor(rank_pool):
    arguments = ({}, "cpu", "inductor", torch.float64, None, (5, 6))
    for passes, graphs, kept in rank_pool.run(runs.compared, 2, *arguments, timeout=240):
        assert_equal(passes, 1e-12)
        assert (graphs, kept) == (1, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_replays_around_a_compiled_block_count_once(rank_pool, reentrant):
    for passes in rank_pool.run(runs.replayed, 2, reentrant, timeout=200):
        assert_equal(passes)


@pytest.mark.parametrize("is_sharded", [True, False])
def test_observers_see_the_routing_of_each_pass_once(rank_pool, is_sharded):
    """Also where all experts are on each rank, and the layer is traced as a whole; in one graph."""
    for passes, breaks, graphs in rank_pool.run(runs.observed, 2, is_sharded, timeout=200):
        assert len(passes) == 3 * 2
        assert_equal(passes)
        assert sum(int(one["dropped"][0].sum()) for one in passes) > 0
        assert (breaks, graphs) == (0, 1)


def test_a_pass_lives_as_long_as_its_graph_and_goes_back_repeatedly(rank_pool):
    for found, kept, dropped in rank_pool.run(runs.twice_and_never, 2, timeout=200):
        assert (kept, dropped) == (2, 0)
        assert_equal([found], 1e-12)


def test_what_nobody_wants_is_not_computed(rank_pool):
    for compiled, plain in rank_pool.run(runs.wanted, 2, timeout=200):
        assert compiled == plain == [(True, True, False, False)] * 2


def test_exchanges_are_not_run_again_to_save_memory(rank_pool):
    for said, found, breaks in rank_pool.run(runs.saving_memory, 2, timeout=200):
        assert "activation_memory_budget makes a compiler run the exchange" in said
        assert breaks, "where the graph may break, it does"
        assert_equal([found])


def test_a_copy_of_a_layer_does_not_run_the_experts_of_the_other(rank_pool):
    for said in rank_pool.run(runs.copied, 2, timeout=200):
        assert "copied while its experts were sharded over ranks" in said
