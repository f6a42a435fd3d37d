"""transformers' models with sharded experts on two ranks, against one plain process on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_fastmoe.testing import RankPool

pytest.importorskip("transformers")
runs: Any = pytest.importorskip("huggingface.sharding_runs")

TWO_GPUS = torch.cuda.device_count() >= 2


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def trained(rank_pool: RankPool, name: str, **options: Any) -> tuple[list[Any], Any]:
    """The traces of two ranks, and the twin's. With one GPU both share it, over gloo."""
    own: dict[str, Any] = {} if TWO_GPUS else {"nodes": 2, "shared_gpu": True}
    run = runs.Run(name, accelerator="cuda", **own, **options)
    found = rank_pool.run(runs.run_case, 2, run, ranks_per_node=None if TWO_GPUS else 1)
    return found, runs.reference(runs.Run(name))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", runs.MODELS)
def test_fp32(name: str, stage: int, rank_pool: RankPool) -> None:
    assert_near(*trained(rank_pool, name, stage=stage))


@pytest.mark.parametrize("dispatcher", ["dedup", "symmetric"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fp32_in_compiled_graphs(name: str, dispatcher: str, rank_pool: RankPool) -> None:
    options = {"compiled": True, "fullgraph": True, "dispatcher": dispatcher}
    assert_near(*trained(rank_pool, name, **options))


def assert_near(found: list[Any], expected: Any) -> None:
    for trace in found:
        assert trace.losses == pytest.approx(expected.losses, rel=1e-4)
        assert trace.norms == pytest.approx(expected.norms, rel=1e-4)
        assert trace.gradients.keys() == expected.gradients.keys()
        for key, gradient in expected.gradients.items():
            assert relative(trace.gradients[key], gradient) < 1e-4, key
        for key, weight in expected.weights[-1].items():
            assert relative(trace.weights[-1][key], weight) < 1e-4, key


@pytest.mark.parametrize("dispatcher", ["all_to_all", "dedup", "dedup_overlapped", "symmetric"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bf16_mixed(name: str, dispatcher: str, rank_pool: RankPool) -> None:
    """The losses: where a router nearly ties, rounding sends a token to other experts."""
    found, expected = trained(rank_pool, name, precision="bf16-mixed", dispatcher=dispatcher)
    for trace in found:
        assert trace.losses == pytest.approx(expected.losses, rel=2e-2)
