"""transformers' models whose experts FastMoEStrategy shards, against one plain process."""

from __future__ import annotations

from collections import Counter

import pytest
from huggingface.experts_classes import IN_FP32, computed_classes
from huggingface.sharded_classes_runs import errors_of_all
from huggingface.sharding_runs import (
    MODELS,
    WITH_AUXILIARY_LOSS,
    Run,
    assert_same,
    reference,
    run_case,
    run_case_and_count,
    run_case_by,
)
from pairwise import OPTION, combinations

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS, AUTO


def check(run: Run, rank_pool) -> None:
    expected = reference(run)
    assert any(".experts." in name for name in expected.gradients)
    for trace in rank_pool.run(run_case, run.world, run):
        assert_same(trace, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_one_process(name: str, stage: int, rank_pool) -> None:
    check(Run(name, stage=stage, in_configure_model=stage == 2), rank_pool)


@combinations(name=["qwen3_moe", "gpt_oss"], ep=["auto", 2, 4], stage=[1, 3])
def test_four_ranks(name: str, ep: int | str, stage: int, rank_pool) -> None:
    """With replicas of each expert, and without."""
    run = Run(name, world=4, ep=ep, stage=stage, accumulate=2, in_configure_model=stage == 3)
    check(run, rank_pool)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing(name: str, stage: int, rank_pool) -> None:
    check(Run(name, stage=stage, checkpointing=True), rank_pool)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_model(stage: int, rank_pool) -> None:
    """At stage 3 graphs break at the experts."""
    check(Run("olmoe", stage=stage, compiled=True), rank_pool)


@pytest.mark.parametrize(
    ("name", "stage", "checkpointing"),
    [*((name, 2, False) for name in MODELS), ("olmoe", 1, True), ("gpt_oss", 2, True)],
)
def test_compiled_layers_without_a_break(
    name: str, stage: int, checkpointing: bool, rank_pool
) -> None:
    """Sharded experts are an operator in the graph, replayed by checkpointing or not."""
    check(
        Run(name, stage=stage, compiled=True, fullgraph=True, checkpointing=checkpointing),
        rank_pool,
    )


@pytest.mark.parametrize("dispatcher", [name for name in ACROSS_RANKS if name != AUTO])
def test_compiled_layers_share_a_graph(dispatcher: str, rank_pool) -> None:
    run = Run("olmoe", compiled=True, fullgraph=True, dispatcher=dispatcher)
    expected = reference(run)
    for trace, graphs in rank_pool.run(run_case_and_count, run.world, run):
        assert_same(trace, expected)
        assert graphs == 2  # of steps, and of validation


@pytest.mark.parametrize("name", WITH_AUXILIARY_LOSS)
def test_the_models_own_balancing_loss(name: str, rank_pool) -> None:
    """Its mean over ranks and micro-batches, each of its own tokens without padding."""
    run = Run(name, accumulate=2, auxiliary=True)
    plain = reference(Run(name, accumulate=2))
    assert reference(run).losses[0] > plain.losses[0] + 0.1
    check(run, rank_pool)


@combinations(
    name=["olmoe", "nemotron_h", "gpt_oss"],
    dispatcher=[name for name in ACROSS_RANKS if name != AUTO],
    stage=[1, 3],
)
def test_every_way_of_exchanging_tokens(name: str, dispatcher: str, stage: int, rank_pool) -> None:
    run = Run(name, stage=stage, dispatcher=dispatcher)
    expected = reference(run)
    for trace in rank_pool.run(run_case_by, run.world, dispatcher, run):
        assert_same(trace, expected)


WAYS = [
    *((one, *how, False) for how in ((2, True), (3, True), (2, False)) for one in ACROSS_RANKS),
    (AUTO, 2, True, True),
    (AUTO, 2, False, True),
]
SHARE = 4
"""Of the classes, one in so many is run in each way that is not compiled, by default."""


def classes_of(place: int, share: int) -> list[str]:
    """Another part of the classes for each way, and for ways with the same dispatcher."""
    return computed_classes()[(place + place // len(ACROSS_RANKS)) % share :: share]


def test_every_class_is_run_in_several_ways():
    eager = [place for place, way in enumerate(WAYS) if not way[-1]]
    seen = Counter(name for place in eager for name in classes_of(place, SHARE))
    assert set(seen) == set(computed_classes())
    assert min(seen.values()) >= 3


@pytest.mark.parametrize(("dispatcher", "world", "on_host", "compiled"), WAYS)
def test_every_class(
    dispatcher: str, world: int, on_host: bool, compiled: bool, rank_pool, request
) -> None:
    """Outputs and gradients in fp64, with dropped slots, against each class's own forward.

    Dropped slots are left out, or, as on a GPU, computed with weight zero.
    """
    place = WAYS.index((dispatcher, world, on_host, compiled))
    if compiled:  # one way alone runs all classes
        names = computed_classes()[:: 6 if on_host else 1]
    else:
        names = classes_of(place, 1 if request.config.getoption(OPTION) else SHARE)
    arguments = (names, dispatcher, on_host, compiled)
    for errors in rank_pool.run(errors_of_all, world, *arguments, timeout=300):
        assert list(errors) == names
        for name, of_class in errors.items():
            limit = 1e-5 if name in IN_FP32 else 1e-10
            assert max(of_class.values()) < limit, (name, of_class)
