"""Single experts under ZeRO 1 to 3 and expert parallelism: a masked twin's numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from strategy import sparse_experts_runs as runs
from strategy.models import Case, build_net, loss_of, make_batches

from lightning_fastmoe import select_experts
from lightning_fastmoe.checkpoint.whole import read_whole

EXPERTS = {"moes.0": [1], "moes.1": [0, 3, 6]}  # of 4 and 8: over 4 ranks, rank 2 has none
NEXT = {"moes.0": [2, 3], "moes.1": [0, 1, 7]}
OPTIONS = {"experts": {f"net.{name}": ids for name, ids in EXPERTS.items()}}
ALL_PARTITIONED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Every parameter is gathered for a forward pass, and again for its backward pass."""
ALIGNMENT = 8  # elements that ZeRO may pad a group's partition with, of few groups


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_masks_on_whole_stacks(stage: int, ep: int, rank_pool) -> None:
    extra = {"config": ALL_PARTITIONED} if stage == 3 else {}
    case = Case(4, ep, stage, num_experts=(4, 8), steps=5, extra=extra)
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


OTHER = {"experts": {"net.moes.0": [2], "net.moes.1": [0, 3, 6]}}


@pytest.mark.parametrize("stage", [1, 3])
def test_resumes_on_other_ranks_with_its_selection_alone(stage: int, rank_pool, tmp_path) -> None:
    path = str(tmp_path / "saved")
    case = Case(4, 4, stage, num_experts=(4, 8), steps=6, batches_per_epoch=2)
    if stage == 3:
        case = replace(case, extra={"config": ALL_PARTITIONED})
    saved = rank_pool.run(runs.train, 4, case, OPTIONS, None, path)[0][1]
    state = read_whole(tmp_path / "saved")["state_dict"]
    assert {f"net.{name}" for name in saved[-1]} == set(state)
    for name, value in saved[-1].items():
        assert torch.equal(state[f"net.{name}"], value), name
    case = replace(case, epochs=2)
    whole = rank_pool.run(runs.train, 4, case, OPTIONS)[0]
    resumed = rank_pool.run(runs.train, 4, case, OPTIONS, path)[0]
    # The same global batches, by the same ranks' loaders, of which each has its own.
    other = replace(case, ep=2, stage=4 - stage, extra={})
    on_others = rank_pool.run(runs.train, 4, other, OPTIONS, path)[0]
    for name, value in whole[1][-1].items():
        assert torch.equal(resumed[1][-1][name], value), name
        torch.testing.assert_close(on_others[1][-1][name], value, rtol=1e-5, atol=1e-6)
        assert name.startswith("norm") or not torch.equal(value, saved[-1][name]), name
    assert on_others[0][-2:] == pytest.approx(whole[0][-2:], rel=1e-5)
    for options in (OTHER, {"experts": {"net.moes.1": [0, 3, 6]}}, {}):
        for said in rank_pool.run(runs.error_of, 4, case, options, path):
            assert said is not None
            assert "another selection" in said
            assert "experts [1] of layer 'net.moes.0' there" in said


@pytest.mark.parametrize("stage", [2, 3])
def test_mixed_precision_resumes_bit_for_bit(stage: int, rank_pool, tmp_path) -> None:
    """From the optimizer's precision, while the stacks are in the model's."""
    path = str(tmp_path / "saved")
    case = Case(2, 2, stage, steps=6, batches_per_epoch=3, precision="bf16-mixed")
    saved = rank_pool.run(runs.train, 2, case, OPTIONS, None, path)[0][1]
    state = read_whole(tmp_path / "saved")["state_dict"]
    case = replace(case, epochs=2)
    whole = rank_pool.run(runs.train, 2, case, OPTIONS)[0][1]
    resumed = rank_pool.run(runs.train, 2, case, OPTIONS, path)[0][1]
    for name, value in whole[-1].items():
        assert torch.equal(resumed[-1][name], value), name
        if ".experts." in name:
            assert value.dtype == torch.bfloat16
            assert torch.equal(state[f"net.{name}"], saved[-1][name]), name


@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_what_is_saved_is_a_whole_model(exclude_frozen, rank_pool, tmp_path) -> None:
    path = str(tmp_path / "saved")
    case = Case(2, 2, 2, num_experts=(4, 8), steps=2)
    saving = replace(case, extra={"exclude_frozen_parameters": exclude_frozen})
    saved = rank_pool.run(runs.train, 2, saving, OPTIONS, None, path)[0][1][-1]
    validated = rank_pool.run(runs.validates, 2, replace(case, stage=3), path)[0]
    apart = rank_pool.run(runs.validates, 2, replace(case, ep=1, stage=3), path, OTHER)[0]
    case = replace(case, in_configure_model=True)
    started = rank_pool.run(runs.loads_weights, 2, case, OTHER, path)[0]
    for name, value in saved.items():
        assert torch.equal(validated[name], value), name
        assert torch.equal(apart[name], value), name
        assert torch.equal(started[name], value), name


@pytest.mark.parametrize(("stage", "offload"), [(2, False), (2, True), (3, True)])
def test_models_of_configure_model_and_accumulation(stage, offload, rank_pool) -> None:
    extra = {"offload_optimizer": True} if offload else {}
    case = Case(2, 2, stage, accumulate=2, in_configure_model=True, extra=extra)
    expected, _ = runs.masked_reference(case, EXPERTS, dense=False)
    norms, weights, _ = rank_pool.run(runs.train, 2, case, {**OPTIONS, "dense": False})[1]
    assert norms == pytest.approx(expected.norms, rel=1e-5)
    for name, value in weights[-1].items():
        torch.testing.assert_close(value, expected.weights[-1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("by", "options"), [("load", {"share": 0.6}), ("gate", {"budget": 4})])
def test_selects_the_same_experts_on_any_topology(by: str, options: dict, rank_pool) -> None:
    case = Case(4, 4, 3, num_experts=(4, 8), steps=3)
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    batches = make_batches(case).flatten(0, 2)
    alone = select_experts(net, batches, by, run=partial(loss_of, net), **options)
    for ep in (1, 4):
        for found in rank_pool.run(partial(runs.selects, **options), 4, replace(case, ep=ep), by):
            assert found == alone


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_within_a_step(stage: int, rank_pool, tmp_path) -> None:
    """Partly accumulated gradients too, of which a rank without trained experts has padding."""
    path = str(tmp_path / "saved")
    case = Case(4, 4, stage, num_experts=(4, 8), steps=3, accumulate=2)
    whole = rank_pool.run(runs.trains_midway, 4, case, OPTIONS, path, False)
    resumed = rank_pool.run(runs.trains_midway, 4, case, OPTIONS, path, True)
    for name, value in whole[2].items():
        torch.testing.assert_close(resumed[2][name], value, rtol=1e-6, atol=1e-7)


WHOLE = {"moes.0": list(range(4)), "moes.1": list(range(8))}


@pytest.mark.parametrize(
    ("first", "second", "release"),
    [(EXPERTS, NEXT, False), (None, EXPERTS, False), (EXPERTS, None, True)],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_fit_trains_others(stage, first, second, release, rank_pool) -> None:
    """ZeRO 3 leaves the model partitioned between the fits."""
    extra = {"config": ALL_PARTITIONED} if stage == 3 else {}
    case = Case(4, 2, stage, num_experts=(4, 8), extra=extra)
    expected, _ = runs.masked_reference(case, first or WHOLE, dense=True)
    net = build_net(case.num_experts, case.coefficients)
    net.load_state_dict(expected.weights[-1])
    with runs.masked(net, second or WHOLE):
        again = runs.reference(case, net)
    options = [
        None if one is None else {"experts": {f"net.{name}": ids for name, ids in one.items()}}
        for one in (first, second)
    ]
    for found in rank_pool.run(runs.trains_twice, 4, case, *options, release):
        for name, value in found[0].items():
            torch.testing.assert_close(value, expected.weights[-1][name], rtol=1e-5, atol=1e-6)
        for name, value in found[-1].items():
            torch.testing.assert_close(value, again.weights[-1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_copy_of_a_model_trains_and_resumes(stage: int, rank_pool, tmp_path) -> None:
    """Also on a rank without trained experts, whose copy must not count as one."""
    saved, again = str(tmp_path / "saved"), str(tmp_path / "again")
    case = Case(2, 2, stage, steps=6, batches_per_epoch=3, in_configure_model=True)
    options = {"experts": {"net.moes.0": [1]}}
    rank_pool.run(runs.trains_a_copy, 2, case, options, saved, None)
    case = replace(case, epochs=2)
    last = rank_pool.run(runs.trains_a_copy, 2, case, options, again, saved)[0]
    state = read_whole(tmp_path / "again")["state_dict"]
    for name, value in last.items():
        assert torch.equal(state[f"net.{name}"], value), name


@pytest.mark.parametrize("stage", [2, 3])
def test_averages_are_refused_without_the_callback_too(stage: int, rank_pool) -> None:
    """Checkpoints would hold averages of the stacks, in which passes put other steps' rows."""
    for said in rank_pool.run(runs.averages_without_callback, 2, Case(2, 2, stage)):
        assert said is not None
        assert "SparseUpdate.release(model)" in said


def test_modules_named_like_trained_experts_are_refused(rank_pool, tmp_path) -> None:
    """Readers of checkpoints leave out what has such a name."""
    case = Case(1, 1, 2, steps=1)
    (said,) = rank_pool.run(runs.saves_a_namesake, 1, case, str(tmp_path / "saved"))
    assert len(said) == 2
    for one in said:
        assert "'net.experts.trained.weight' has '.experts.trained.' in its name" in one
