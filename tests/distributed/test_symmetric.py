"""Rows pushed into memory that ranks share: what is read, when, and how it fails."""

from __future__ import annotations

import pytest
import torch
from distributed import dedup_runs, schedule_runs
from distributed import symmetric_runs as runs
from torch.distributed import _symmetric_memory

from lightning_fastmoe.distributed.symmetric import memory
from lightning_fastmoe.distributed.symmetric.layer import Expectation
from lightning_fastmoe.distributed.symmetric.places import Sizes


def test_memory_grows_with_the_tokens_of_any_rank_and_nothing_unwritten_is_read(rank_pool):
    calls = [(5, 9), (40, 1), (0, 0), (300, 2000), (2000, 300), (2050, 1)]
    for found in rank_pool.run(runs.numbers_of_tokens, 2, "cpu", calls):
        assert max(found["errors"]) < 1e-10
        first, *rest = found["capacities"]
        assert rest == [first, first, rest[2], rest[2], rest[2]]
        assert first < rest[2]


def test_rows_that_are_no_multiple_of_16_bytes(rank_pool):
    """In fp32 the contract's rows have 24: those of different ranks have no common distance."""
    arguments = ("symmetric", "equal blocks", "cpu", torch.float32)
    for cases in rank_pool.run(schedule_runs.compared, 2, *arguments):
        for case, tensors in cases.items():
            for name, (found, right) in tensors.items():
                message = f"{case}, {name}"
                torch.testing.assert_close(
                    found, right, rtol=1e-5, atol=2e-5, msg=lambda m, w=message: f"{w}: {m}"
                )


def test_experts_launched_before_the_host_knows_the_counts(rank_pool):
    """The bits of a pass that waits, also where there were more tokens than expected."""
    calls = [(300, 300), (300, 300), (280, 290), (5, 0), (0, 0), (350, 350), (2000, 3), (1900, 3)]
    results = rank_pool.run(runs.reading_ahead, 2, "cpu", calls)
    for rank, found in enumerate(results):
        assert found["wrong"] == []
        # Nothing was expected at first. The seventh call had no room on rank 0, which knew that.
        short = "exactly" if rank == 0 else "ahead then exactly"
        too_many = "ahead then exactly"
        assert found["how"] == ["exactly", *["ahead"] * 4, too_many, short, "ahead"]


def test_expected_sizes():
    expectation = Expectation()
    assert expectation.at_most(1, with_graph=True) is None
    expectation.add(Sizes(100, 100), with_graph=True)
    assert expectation.at_most(1, with_graph=True) == Sizes(107, 106)
    assert expectation.at_most(1, with_graph=True, all_pairs=True) == Sizes(107, 107)
    assert expectation.at_most(2, with_graph=True) == Sizes(107, 107)
    assert expectation.at_most(2, with_graph=False) is None
    expectation.add(Sizes(0, 0), with_graph=False)
    assert expectation.at_most(1, with_graph=False, all_pairs=True) == Sizes(1, 1)


def test_experts_launched_ahead_with_one_slot(rank_pool):
    for found in rank_pool.run(runs.reading_ahead, 2, "cpu", [(300, 300), (200, 210)], 1):
        assert found == {"wrong": [], "how": ["exactly", "ahead"]}


def test_training_after_a_larger_validation_keeps_what_it_would_keep_without(rank_pool):
    for found in rank_pool.run(runs.validated_first, 2, "cpu"):
        assert max(found["errors"]) < 1e-10
        after, without = found["kept"]
        assert after == without
        assert found["parts"] == [0, 0]


def test_without_memory_for_rows_that_might_come_those_that_came_are_computed(rank_pool):
    for found in rank_pool.run(runs.without_memory_ahead, 2):
        assert all(found)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_far_apart_get_the_same_bits(rank_pool, world):
    assert rank_pool.run(runs.at_random_times, world, "cpu", 40, 4e-3) == [[]] * world


@pytest.mark.parametrize("how", ["twice", "two graphs", "checkpointed"])
def test_several_passes_through_one_layer(rank_pool, how):
    for tensors in rank_pool.run(dedup_runs.steps, 2, "symmetric", how):
        for what, (found, right) in tensors.items():
            torch.testing.assert_close(
                found, right, rtol=1e-10, atol=1e-10, msg=lambda m, n=what: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_dedup(rank_pool, dtype):
    by_dedup, by_symmetric = (
        rank_pool.run(dedup_runs.repeated, 2, name, dtype) for name in ("dedup", "symmetric")
    )
    for (rights, _), (found, _) in zip(by_dedup, by_symmetric, strict=True):
        for values in found:
            for a, b in zip(values, rights[0], strict=True):
                assert torch.equal(a, b)


def test_a_layer_with_capacity_and_router_equals_all_to_all(rank_pool):
    for found in rank_pool.run(dedup_runs.layers, 2, ["symmetric", "all_to_all"]):
        for key, value in found["symmetric"].items():
            torch.testing.assert_close(value, found["all_to_all"][key], rtol=1e-12, atol=1e-12)


def test_a_rank_that_never_comes_is_named_at_the_deadline(rank_pool):
    (error, took), _ = rank_pool.run(runs.faults, 2, "cpu", "never comes")
    assert 2.5 < took < 10
    assert "rank 0 has waited 3 s" in error
    assert "phase counts" in error
    assert "Missing: rank 1 of the expert parallel group" in error
    assert "then: a layer" in error


def test_nobody_waits_for_a_rank_that_has_given_up(rank_pool):
    (error, took), _ = rank_pool.run(runs.faults, 2, "cpu", "given up")
    assert "Given up: rank 1 of the expert parallel group" in error
    assert took < 10


@pytest.mark.parametrize("where", ["other layers", "the end"])
def test_ranks_in_other_layers_are_an_error_on_all(rank_pool, where):
    for error, took in rank_pool.run(runs.faults, 2, "cpu", where):
        assert "Every rank must run the same MoE layers" in error
        assert took < 2.5


def test_an_interrupted_wait_is_not_said_to_have_reached_its_deadline(rank_pool):
    said, _ = rank_pool.run(runs.interrupted, 2)
    assert "Missing: rank" in said
    assert "has waited" not in said


def test_a_rank_without_backward_is_named(rank_pool):
    error, _ = rank_pool.run(runs.without_backward, 2)
    assert "phase combine (backward): rank 0 has waited" in error
    assert "Missing: rank 1" in error


def test_backward_passes_in_other_orders_are_an_error(rank_pool):
    errors = rank_pool.run(runs.other_order, 2)
    assert any("In another exchange: rank" in error for error in errors), errors
    assert "none" not in errors


def test_rows_of_different_lengths_are_an_error(rank_pool):
    errors = rank_pool.run(runs.other_dtypes, 2)
    assert any("In another exchange: rank" in error for error in errors), errors
    assert "none" not in errors


@pytest.mark.parametrize(("kind", "reason"), [("hosts", "2 hosts"), ("fails", "no memory left")])
def test_where_memory_cannot_be_shared_all_ranks_say_so(rank_pool, kind, reason):
    for error in rank_pool.run(runs.refused, 2, kind):
        assert reason in error
        assert "dispatcher='dedup'" in error


@pytest.mark.parametrize(
    ("change", "gpus", "reason"),
    [
        ({}, ["a", "b"], None),
        ({"kernels": None}, ["a", "b"], "kernels are unavailable"),
        ({"connections": "1"}, ["a", "b"], "CUDA_DEVICE_MAX_CONNECTIONS=1"),
        ({"access": False}, ["a", "b"], "GPU 0 has no access to the memory of GPU 1"),
        ({"access": False}, ["a", "hidden"], None),  # only mapping it will tell
        ({"access": False}, ["a", "a"], None),  # shared
        ({"backend": "NVSHMEM"}, ["a", "b"], "set to NVSHMEM, not to CUDA"),
        ({"no_multicast": "0"}, ["a", "b"], "multicast is on"),
    ],
    ids=str,
)
def test_what_is_known_before_memory_is_mapped(change, gpus, reason, monkeypatch):
    now = {"kernels": "some", "connections": "8", "access": True, "backend": "CUDA"} | change
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", change.get("no_multicast", "1"))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", now["connections"])
    monkeypatch.setattr(memory.native, "load", lambda: now["kernels"])
    monkeypatch.setattr(memory.native, "unavailable_reason", lambda: "no driver")
    monkeypatch.setattr(memory, "_gpu", lambda index: "ab"[index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _, __: now["access"])
    monkeypatch.setattr(_symmetric_memory, "get_backend", lambda _: now["backend"])
    found = memory._why_not_cuda(torch.device("cuda", 0), gpus)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def test_other_processors_reorder_stores(rank_pool):
    for error in rank_pool.run(runs.refused, 2, "arm"):
        assert "the order in which x86 stores, not aarch64" in error
