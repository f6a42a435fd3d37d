"""Single experts under ZeRO 1 to 3 and expert parallelism: a masked twin's numbers."""

from __future__ import annotations

import pytest
import torch
from strategy import sparse_experts_runs as runs
from strategy.models import Case

EXPERTS = {"moes.0": [1], "moes.1": [0, 3, 6]}  # of 4 and 8: over 4 ranks, rank 2 has none
OPTIONS = {"experts": {f"net.{name}": ids for name, ids in EXPERTS.items()}}
ALIGNMENT = 8  # elements that ZeRO may pad a group's partition with, of few groups


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_masks_on_whole_stacks(stage: int, ep: int, rank_pool) -> None:
    case = Case(4, ep, stage, num_experts=(4, 8), steps=5)
    expected, initial = runs.masked_reference(case, EXPERTS, dense=True)
    results = rank_pool.run(runs.train, 4, case, OPTIONS)
    for norms, weights, _ in results:
        assert norms == pytest.approx(expected.norms, rel=1e-5)
        assert set(weights[0]) == set(initial)
        for found, wanted in zip(weights[1:], expected.weights, strict=True):
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
                layer, is_expert, _ = name.partition(".experts.")
                for i in range(len(value)) if is_expert else ():
                    is_trained = i in EXPERTS[layer]
                    assert torch.equal(value[i], initial[name][i]) is not is_trained, (name, i)
    trained = sum(
        p[EXPERTS[name.partition(".experts.")[0]]].numel() if ".experts." in name else p.numel()
        for name, p in initial.items()
    )
    states = sum(count for _, _, count in results)
    assert trained <= states <= trained + 4 * 4 * ALIGNMENT
