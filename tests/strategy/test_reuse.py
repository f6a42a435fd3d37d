"""One module, several Trainers; layers that stay whole; checkpoints of other layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy.models import Case, Trace, build_net, reference
from strategy.reuse_runs import (
    fit_in_new_groups,
    fit_twice,
    local_layer,
    one_rank_reference,
    resume_with_another_order,
    save_after_validating,
    warnings_of_saving,
)

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.testing import RankError

CASE = Case(world=2, ep=2)


def second_fit(case: Case) -> Trace:
    """A plain process that goes on from the weights of a first run, with a new optimizer."""
    first = reference(case)
    net = build_net(case.num_experts, case.coefficients)
    net.load_state_dict(first.weights[-1])
    return reference(case, net)


@pytest.mark.parametrize("between", ["nothing", "validate"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_second_fit_equals_one_process(stage: int, between: str, rank_pool) -> None:
    case = replace(CASE, stage=stage)
    expected = second_fit(case)
    for trace in rank_pool.run(fit_twice, 2, case, between):
        assert trace.losses == pytest.approx(expected.losses, rel=1e-5)
        assert trace.norms == pytest.approx(expected.norms, rel=1e-5)
        for name, weight in expected.weights[-1].items():
            torch.testing.assert_close(trace.weights[-1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_process_groups_may_be_destroyed_between_fits(stage: int, rank_pool) -> None:
    case = Case(world=1, ep=1, stage=stage)
    first, second = rank_pool.run(fit_in_new_groups, 1, case)[0]
    assert second.losses == first.losses
    assert second.weights[-1].keys() == first.weights[-1].keys()
    for name, weight in first.weights[-1].items():
        assert torch.equal(second.weights[-1][name], weight), name


def test_what_zero_3_has_partitioned_needs_its_process_groups(rank_pool) -> None:
    with pytest.raises(RankError, match=r"TopologyError.*'net\.\S+' over a process group that has"):
        rank_pool.run(fit_twice, 1, Case(world=1, ep=1, stage=3), "destroy")


@pytest.mark.parametrize("stage", [2, 3])
def test_saving_after_validating(stage: int, tmp_path: Path, rank_pool) -> None:
    case = replace(CASE, stage=stage)
    for before, after in rank_pool.run(save_after_validating, 2, case, str(tmp_path)):
        assert before > 0
        assert after == before


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_that_was_evaluated_is_not_saved_unnoticed(stage, tmp_path, rank_pool) -> None:
    """Its optimizer is gone, and in mixed precision its fp32 weights."""
    case = replace(CASE, stage=stage, precision="bf16-mixed")
    first, second = rank_pool.run(warnings_of_saving, 2, case, str(tmp_path))
    assert list(map(len, first)) == [0, 1, 0]
    assert second == [[], [], []], "rank 0 says it for all"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_order_of_parameters_may_change(stage: int, tmp_path: Path, rank_pool) -> None:
    """ZeRO's partitions are other ones then; each state must find its parameter by name."""
    rank_pool.run(resume_with_another_order, 2, replace(CASE, stage=stage), str(tmp_path))
    with (
        CheckpointReader(tmp_path / "checkpoint") as one,
        CheckpointReader(tmp_path / "again") as two,
    ):
        names = one.manifest.tensors.keys()
        assert two.manifest.tensors.keys() == names
        assert {"weights/net.a.weight", "optimizer/exp_avg/net.head.weight"} <= names
        assert not torch.equal(one.read("weights/net.a.weight"), one.read("weights/net.b.weight"))
        for name in names:
            assert torch.equal(one.read(name), two.read(name)), name


@pytest.mark.parametrize("stage", [2, 3])
def test_local_layer_stays_whole_and_trains_right(stage: int, rank_pool) -> None:
    case = replace(CASE, stage=stage, ep="auto")
    expected = one_rank_reference(case)
    for ep_size, local, norms in rank_pool.run(local_layer, 2, case):
        assert (ep_size, local) == (2, [2, 4, 3])
        assert norms == pytest.approx(expected, rel=1e-6)
