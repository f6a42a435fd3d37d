"""OffloadDDPStrategy on two ranks: the bits of the whole model, one copy of it, and no hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inference import offload_ddp_runs as runs
from inference.offload_models import Blocks

from lightning_fastmoe import OffloadDDPStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.testing import RankError, RankPool

OTHER = ((0, 1, 2, 3), (3, 0, 0, 2))
"""Rank 1 runs layers in another order, one twice, and one not at all."""


@pytest.mark.parametrize(
    ("samples", "orders", "options", "early"),
    [
        (40, (runs.IN_ORDER, runs.IN_ORDER), {}, False),
        (31, (runs.IN_ORDER, runs.IN_ORDER), {"slots": 3}, True),
        (31, OTHER, {}, False),
        (31, OTHER, {"slots": 1, "resident_layers": 1}, False),
        (31, OTHER, {"slots": 4}, False),
        (31, OTHER, {"gather": False}, False),
    ],
)
def test_the_same_bits(
    rank_pool: RankPool, samples: int, orders: Any, options: dict[str, Any], early: bool
) -> None:
    """With 31 samples rank 0 has 16, in 4 batches, and rank 1 has 15, in 3."""
    results = rank_pool.run(runs.predictions, 2, samples, orders, options, early, timeout=60)
    own = [(4, 20), (4, 20)] if samples == 40 else [(4, 16), (3, 15)]
    layers = 4 - options.get("resident_layers", 0)
    slots = min(options.get("slots", 2), layers)
    joined = 0 if options.get("gather") is False else slots
    if slots < layers and joined:
        joined += 4 * layers  # in as many passes, also where there are 3 batches
    for result, (batches, predicted) in zip(results, own, strict=True):
        assert result == [(batches, predicted, joined)] * 2


def test_validation_is_reduced_over_ranks(rank_pool: RankPool) -> None:
    found = rank_pool.run(runs.validation, 2, 20, timeout=60)
    model = Blocks({}).eval()
    with torch.no_grad():
        right = float(model(torch.cat(list(runs.data(20)))).double().mean())
    assert found == pytest.approx([right, right], rel=1e-5)


def test_experts_are_in_memory_once(rank_pool: RankPool) -> None:
    """And what a rank writes afterwards is its own."""
    first, second = rank_pool.run(runs.memory, 2, timeout=60)
    assert first == second  # of one file
    ((_, permissions),) = first["files"]
    assert permissions == "rw-s"
    assert first["inside"]
    assert not first["outside"]
    assert first["kept"]
    assert first["again"]  # a second call finds them where they were
    assert first["own"]


def test_a_checkpoint_is_loaded(rank_pool: RankPool, tmp_path: Path) -> None:
    assert rank_pool.run(runs.loaded, 2, str(tmp_path), timeout=60) == [True, True]


@pytest.mark.parametrize(
    ("phase", "first", "second"),
    [
        ("build", "Rank 1 could not set up its model: RuntimeError", "rank 1 can't"),
        ("other", "Rank 1 could not set up its model: ConfigError", "has built other experts"),
        ("rest", "Rank 1 has built another model", "Rank 1 has built another model"),
        ("change", "Experts were changed after", "Experts were changed after"),
        ("step", "", "rank 1 can't"),
        ("fit", "OffloadStrategy can't train", "OffloadStrategy can't train"),
    ],
)
def test_an_error_of_one_rank_ends_all(
    rank_pool: RankPool, phase: str, first: str, second: str
) -> None:
    with pytest.raises(RankError) as raised:
        rank_pool.run(runs.failing, 2, phase, timeout=60)
    assert set(raised.value.errors) == {0, 1}
    assert first in raised.value.errors[0][1]
    assert second in raised.value.errors[1][1]


def test_a_ring_without_lightning(rank_pool: RankPool) -> None:
    """What one rank leaves out of a pass it joins at its end, and copies then by itself."""
    first, second = rank_pool.run(runs.ring, 2, "cpu", 0, timeout=60)
    assert first == (2 + 6 * 4, 0)
    assert second[0] == first[0]
    assert second[1] > 0


@pytest.mark.parametrize(
    "options", [{}, {"gather": False, "expert_cache": "64KB"}, {"expert_cache": "64KB"}]
)
def test_few_tokens(rank_pool: RankPool, options: dict[str, Any]) -> None:
    """Exchanges are those of whole layers; steps after them copy the experts that they chose."""
    results = rank_pool.run(runs.few_tokens, 2, options, timeout=60)
    for joined, hits, misses in results:
        assert joined == (0 if "gather" in options else 2 + 4 * 4)
        assert misses > 0
        assert hits > 0 or "expert_cache" not in options


@pytest.mark.parametrize("gather", [True, False])
def test_chunks(rank_pool: RankPool, gather: bool) -> None:
    """Rank 1 repeats a batch."""
    assert rank_pool.run(runs.chunks, 2, gather, timeout=60) == [[5, 5, 5, 1], [5, 5, 5, 5]]


def test_what_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="compression='int8' is not supported on several GPUs"):
        OffloadDDPStrategy(compression="int8")
    with pytest.raises(ConfigError, match="groups=2 is not supported on several GPUs"):
        OffloadDDPStrategy(groups=2)
