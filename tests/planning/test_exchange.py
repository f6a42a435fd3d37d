"""What the exchange of tokens takes: formulas, against what ranks hold and GPUs have measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pairwise import combinations
from planning import exchange_runs as runs

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed.schedule.dedup import draft, owners
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.planning.exchange import (
    Arrival,
    ExchangePlan,
    LayerShape,
    expected_arrival,
    kept_bytes,
    launched_ahead,
    layer_shapes,
    symmetric_buffers,
    symmetric_capacity,
    working_bytes,
)

SMALL = LayerShape(960, 16, 16, 8, num_experts=8, top_k=3, itemsize=8)
EXACT = replace(SMALL, exact=True)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "layers",
    [
        [SMALL],
        # 12 bytes of tokens and 20 of slots take 16 and 32.
        [LayerShape(1000, 6, 16, 8, 8, 1, 2), LayerShape(1000, 6, 16, 8, 8, 3, 4)],
        # The second fits into the eighth more of the first, the third doesn't.
        [replace(SMALL, tokens=tokens) for tokens in (4000, 4400, 4800)],
        # Smaller ones need no more.
        [replace(SMALL, tokens=4800), SMALL, replace(SMALL, itemsize=2)],
        # A row of 32 bytes for each slot, with biases 64; each with a weight.
        [replace(EXACT, itemsize=2), replace(EXACT, itemsize=2, has_biases=True)],
        [replace(EXACT, tokens=4800, itemsize=4), EXACT, replace(SMALL, tokens=6000)],
        [replace(EXACT, top_k=1, itemsize=2, has_biases=True)],
    ],
)
def test_the_buffers_are_those_that_ranks_share(layers, ranks, rank_pool):
    layers = [replace(layer, dispatcher="symmetric") for layer in layers]
    expected = symmetric_capacity(layers), symmetric_buffers(layers, ranks)
    assert rank_pool.run(runs.buffers, ranks, layers) == [expected] * ranks


def test_the_order_of_layers_decides_how_far_the_buffers_grow():
    small, large = replace(SMALL, tokens=4000), replace(SMALL, tokens=4400)
    assert symmetric_capacity([small, large]) == symmetric_capacity([small])
    assert symmetric_capacity([small]) < symmetric_capacity([large, small])


@pytest.mark.parametrize(
    ("experts", "slots", "ranks"), [(8, 2, 2), (8, 2, 8), (64, 8, 4), (128, 8, 2), (6, 4, 3)]
)
def test_rows_that_arrive_are_those_of_draws(experts, slots, ranks):
    """The mean of many draws lies within five of its standard errors."""
    tokens, draws = 500, 40
    layer = LayerShape(tokens, 16, 16, 8, experts, slots, 2, "dedup")
    where = owners(equal_blocks(experts, ranks), experts)
    generator = torch.Generator().manual_seed(0)
    sent = []
    for _ in range(draws):
        chosen = torch.rand(tokens, experts, generator=generator).topk(slots, dim=1).indices
        sent.append(float(draft(chosen, where, ranks).counts[experts:].sum()))
    found = torch.tensor(sent)
    error = float(found.std()) / draws**0.5
    assert float(found.mean()) == pytest.approx(
        expected_arrival(layer, ranks).rows, abs=5 * error + 0.5
    )


def exact_arrival(layer: LayerShape, ranks: int) -> Arrival:
    """What comes to each rank of :func:`runs.balanced`."""
    pairs = layer.tokens * layer.top_k
    if layer.dispatcher == "all_to_all":
        return Arrival(pairs, pairs)
    owner = runs.balanced(layer, ranks) // (layer.num_experts // ranks)
    rows = sum(int((owner == rank).any(1).sum()) for rank in range(ranks))
    return Arrival(rows, pairs)


def check_kept(layer: LayerShape, ranks: int, ahead: bool, rank_pool) -> None:
    """Compares :func:`kept_bytes` with what each rank keeps."""
    expected = kept_bytes(layer, ranks, exact_arrival(layer, ranks), ahead=ahead)
    counts = 64 * (layer.num_experts + ranks)  # a few per expert and rank
    for found in rank_pool.run(runs.kept, ranks, layer, ahead):
        assert expected <= found <= expected + counts


@pytest.mark.parametrize("itemsize", [2, 8])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("dispatcher", "ahead"),
    [
        ("all_to_all", False),
        ("dedup", False),
        ("dedup_overlapped", False),
        ("symmetric", False),
        ("symmetric", True),
    ],
)
def test_a_layer_keeps_what_autograd_and_its_nodes_hold(
    dispatcher, ahead, ranks, itemsize, rank_pool
):
    layer = replace(SMALL, dispatcher=dispatcher, itemsize=itemsize)
    check_kept(layer, ranks, ahead, rank_pool)


BY_PAIR = [
    EXACT,
    replace(EXACT, itemsize=2),
    replace(EXACT, itemsize=2, has_biases=True),
    replace(EXACT, top_k=1),
]


@combinations(
    way=[("dedup", False), ("symmetric", False), ("symmetric", True)],
    layer=BY_PAIR,
    ranks=[2, 4],
)
def test_an_exact_layer_keeps_what_autograd_and_its_nodes_hold(way, layer, ranks, rank_pool):
    """It never launches ahead of the counts, except with one slot."""
    dispatcher, ahead = way
    check_kept(replace(layer, dispatcher=dispatcher), ranks, ahead, rank_pool)


def test_a_layer_on_one_rank_keeps_what_autograd_saves(rank_pool):
    layer = replace(SMALL, dispatcher="local")
    expected = kept_bytes(layer, 1, expected_arrival(layer, 1))
    (found,) = rank_pool.run(runs.kept, 1, layer, False)
    assert expected <= found <= expected + 64 * layer.num_experts


MEASURED = {
    LayerShape(24576, 1536, 512, 256, 128, 8, 2): (1.015, 1.330, 1.209, 2.54, 1.04),
    LayerShape(24576, 2048, 2048, 1024, 64, 8, 2): (1.956, 2.310, 2.226, 3.87, 1.93),
    LayerShape(24576, 2048, 1536, 768, 128, 8, 2): (1.976, 2.208, 2.065, 3.72, 2.08),
    LayerShape(8192, 4096, 28672, 14336, 8, 2, 2): (3.626, 2.547, 2.572, 2.62, 3.38),
    LayerShape(24576, 4096, 2048, 1024, 64, 4, 2): (2.265, 2.650, 2.341, None, None),
    LayerShape(8192, 7168, 4096, 2048, 32, 8, 2): (3.348, 2.587, 2.521, None, None),
}
"""GiB of a step's peak, gradients included, as benchmarks/expert_parallel.py measured them on H200:
on one GPU, then on two by each of :data:`WAYS`; the last two in an earlier run."""
NAMES = ["sonic", "olmoe", "qwen3", "mixtral", "sonic-30b", "deepseek-v3"]
WAYS = ("local", "dedup", "symmetric", "all_to_all", "dedup_overlapped")
CASES = [
    pytest.param(shape, way, peak, id=f"{name}-{way}")
    for name, (shape, peaks) in zip(NAMES, MEASURED.items(), strict=True)
    for way, peak in zip(WAYS, peaks, strict=True)
    if peak is not None
]


@pytest.mark.parametrize(("layer", "way", "measured"), CASES)
def test_the_peak_is_the_one_that_gpus_measured(layer, way, measured):
    """Within 4 %, most of which is workspace of split gradients, where it is more than 1 %."""
    ranks, layer = 1 if way == "local" else 2, replace(layer, dispatcher=way)
    # Logits and scores in fp32; the chosen experts and their weights.
    router = layer.tokens * (8 * layer.num_experts + 12 * layer.top_k)
    arrival = expected_arrival(layer, ranks)
    planned = kept_bytes(layer, ranks, arrival) + working_bytes(layer, ranks, arrival) + router
    assert 0.96 <= planned / (measured * 2**30) <= 1.01


def test_what_is_launched_ahead_is_a_sixteenth_more():
    assert launched_ahead(Arrival(1600, 3200), 3) == Arrival(1701, 3401)
    assert launched_ahead(Arrival(100, 300), 3) == Arrival(107, 319)
    assert launched_ahead(Arrival(0, 0), 3) == Arrival(1, 1)
    assert launched_ahead(Arrival(100, 100), 1) == Arrival(107, 106)


def test_auto_is_symmetric_where_the_counts_have_room():
    auto = replace(SMALL, dispatcher="auto")
    assert [auto.way(ranks) for ranks in (1, 2, 32, 64)] == [
        *("local", "symmetric", "symmetric", "dedup")
    ]
    assert replace(auto, num_experts=4093).way(2) == "symmetric"
    assert replace(auto, num_experts=4094).way(2) == "dedup"
    assert replace(auto, dispatcher="all_to_all").way(2) == "all_to_all"


def test_only_layers_that_share_memory_need_buffers():
    dedup = replace(SMALL, dispatcher="dedup", tokens=10**6)
    assert symmetric_buffers([dedup], 2) == 0
    assert symmetric_buffers([SMALL, dedup], 1) == 0
    assert symmetric_buffers([SMALL, dedup], 2) == symmetric_buffers([SMALL], 2) > 0
    plan = ExchangePlan([SMALL, dedup], 2)
    assert plan.ways == '"symmetric", "dedup"'
    assert len(plan.kept) == 2
    assert ExchangePlan([], 2).working == 0


def test_shapes_of_layers():
    gated, plain = MoE(16, 8, 4, 2), MoE(16, 8, 4, 1, activation="gelu", dispatcher="dedup")
    modules = MoE(16, None, 4, 2, expert=lambda d_model: torch.nn.Linear(d_model, d_model))
    assert layer_shapes([gated, modules, plain], 5, 2) == [
        LayerShape(5, 16, 16, 8, 4, 2, 2, "auto"),
        LayerShape(5, 16, 8, 8, 4, 1, 2, "dedup"),
    ]
    exact = [MoE(16, 8, 4, 2, exact=True), MoE(16, 8, 4, 2, bias=True)]
    shape = LayerShape(5, 16, 16, 8, 4, 2, 2)
    biased = replace(shape, has_biases=True)
    assert layer_shapes(exact, 5, 2) == [replace(shape, exact=True), biased]
    assert layer_shapes(exact, 5, 2, exact=True) == [
        replace(one, exact=True) for one in (shape, biased)
    ]


T, N, D, F = 900, 2700, 64, 16
OUT, X = T * D * 2, N * D * 2
"""Of an exact layer in bf16 with three slots, and with two experts on each of two ranks, whose
projections have D * F elements."""
WEIGHTS = 2 * 2 * D * F


@pytest.mark.parametrize(
    ("way", "options", "expected"),
    [
        # The gradient of Y, that of X, and those of weights.
        ("symmetric", {}, OUT + X + WEIGHTS + X + WEIGHTS),
        # Y, its copy in the order of ranks, and what came back.
        ("dedup", {}, 3 * X),
        # Y as computed; in fp32, with its bias, and the sum.
        ("symmetric", {"has_biases": True}, X + 3 * 2 * X),
        ("dedup", {"has_biases": True}, X + 3 * 2 * X),
        # In fp32 nothing is widened; rows of gradients are copied, although each token has one.
        (
            "symmetric",
            {"has_biases": True, "itemsize": 4},
            2 * (OUT + X + WEIGHTS + X + X),
        ),
        # One slot needs no rows by pair.
        ("symmetric", {"top_k": 1}, None),
    ],
)
def test_an_exact_layer_works_with_rows_of_pairs(way, options, expected):
    layer = LayerShape(T, D, F, F, 4, 3, 2, way, exact=True)
    layer, arrival = replace(layer, **options), Arrival(T, N)
    if expected is None:
        expected = working_bytes(replace(layer, exact=False), 2, arrival)
    assert working_bytes(layer, 2, arrival) == expected
    others = (
        working_bytes(layer, 1, arrival),
        working_bytes(replace(layer, exact=False), 1, arrival),
    )
    assert others[0] == others[1]
