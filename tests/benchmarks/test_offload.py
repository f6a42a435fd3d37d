"""benchmarks/offload.py compares systems that compute the same."""

from __future__ import annotations

import torch
from benchmarks.offload_peers import losses_and_texts

from lightning_fastmoe.testing import RankPool


def test_peers_compute_the_same(rank_pool: RankPool) -> None:
    (found,) = rank_pool.run(losses_and_texts, 1)
    assert found.pop("held") < 100 * 20  # ZeRO keeps only what is small
    loss, text = found.pop("ours")
    assert 4 < loss < 9
    for name, (other, continuation) in found.items():
        assert abs(other - loss) < 1e-2, name  # bf16
        assert torch.equal(continuation[:, :32], text[:, :32]), name
    for name, (other, continuation) in found.items():
        assert torch.equal(other, found["Accelerate"][0]), name
        assert torch.equal(continuation, found["Accelerate"][1]), name
