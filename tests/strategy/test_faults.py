"""A save that fails on one rank fails on all alike, and training goes on as if nothing was."""

from __future__ import annotations

import pytest
import torch
from strategy import fault_runs as runs
from strategy.models import Case

from lightning_fastmoe.checkpoint import CheckpointReader


def case_of(stage: int, **kwargs) -> Case:
    return Case(2, 2, stage, steps=2, **kwargs)


@pytest.mark.parametrize("stage", [2, 3])
def test_every_fault_is_named_on_all_ranks_and_harms_nothing(rank_pool, tmp_path, stage):
    path = tmp_path / "last.ckpt"
    results = rank_pool.run(runs.through_all_faults, 2, case_of(stage), str(path))
    undisturbed = rank_pool.run(runs.through_all_faults, 2, case_of(stage), None)
    (first, _), (second, _) = results
    assert first.errors == second.errors
    assert first.errors.keys() == runs.FAULTS.keys()
    for name, (rank, _, words) in runs.FAULTS.items():
        kind, message = first.errors[name]
        assert kind == "CheckpointError", name
        assert str(path) in message, name
        assert f"could not be saved: rank {rank} failed" in message, name
        assert words in message, name
        assert first.left[name] == ["last.ckpt"], name
    with CheckpointReader(path) as reader:
        reader.verify()
        assert reader.manifest.progress["global_step"] == 1
    for (seen, weights), (_, expected) in zip(results, undisturbed, strict=True):
        assert len(seen.hashes) == 1, "a failed save has changed the state of training"
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_send_each_other_nothing_but_metadata(rank_pool, tmp_path, stage):
    """A model twice as wide has four times the data, and the same metadata."""
    sizes = {}
    for width in (1, 2):
        case = case_of(stage, num_experts=(4 * width, 8 * width))
        path = str(tmp_path / f"{width}.ckpt")
        sizes[width] = rank_pool.run(runs.traffic_of_a_save, 2, case, path)
    for (sent, data), (sent_twice, data_twice) in zip(sizes[1], sizes[2], strict=True):
        assert data_twice > 1.7 * data
        assert 0 < sent_twice < 1.05 * sent
