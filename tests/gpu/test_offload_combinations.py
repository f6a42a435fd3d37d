"""Options of offloading together, with copies that begin late and slots full of NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inference import offload_ddp_runs as ddp_runs
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import D_MODEL, KINDS, Chunkable, InChunks, disturbed

from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.testing import RankPool

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize("options", [{}, {"expert_cache": "64KB"}, {"slots": 1}])
def test_chunks_of_few_tokens(cycles: int, options: dict[str, Any]) -> None:
    model = Chunkable(KINDS["softmax"]).eval()
    twin = InChunks(copy.deepcopy(model), 1).cuda()
    offloaded = offload_experts(model, "cuda", chunk_sequences=1, **options)
    disturbed(offloaded, cycles)
    with torch.inference_mode():
        for sequences in (1, 3, 3, 1, 1, 4):
            x = torch.randn(sequences, 1, D_MODEL, device="cuda")
            assert torch.equal(model(x), twin(x)), sequences
    assert offloaded.statistics.expert_misses
    offloaded.close()


@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
def test_chunks_of_compressed_experts(compression: str) -> None:
    model = Chunkable(KINDS["softmax"]).eval()
    right = InChunks(rounded(model, compression), 2).cuda()  # type: ignore[arg-type]
    offloaded = offload_experts(model, "cuda", chunk_sequences=2, compression=compression)
    with torch.inference_mode():
        for sequences in (5, 2, 5, 1, 5):
            x = torch.randn(sequences, 3, D_MODEL, device="cuda")
            assert torch.equal(model(x), right(x)), sequences
    assert offloaded.statistics.misses == 0
    offloaded.close()


@TWO_GPUS
@pytest.mark.parametrize(
    "options", [{}, {"gather": False, "expert_cache": "64KB"}, {"expert_cache": "64KB"}]
)
def test_few_tokens_on_two_gpus(rank_pool: RankPool, options: dict[str, Any]) -> None:
    for joined, _, misses in rank_pool.run(ddp_runs.few_tokens, 2, options, "cuda"):
        assert joined == (0 if "gather" in options else 2 + 4 * 4)
        assert misses > 0


@TWO_GPUS
@pytest.mark.parametrize("gather", [True, False])
def test_chunks_on_two_gpus(rank_pool: RankPool, gather: bool) -> None:
    assert rank_pool.run(ddp_runs.chunks, 2, gather, "cuda") == [[5, 5, 5, 1], [5, 5, 5, 5]]
