"""A plain loop over several ranks trains to the numbers of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from distributed import data_parallel_runs as runs
from distributed.data_parallel_runs import Case
from torch import nn

from lightning_fastmoe import moe_losses
from lightning_fastmoe.distributed import ExpertDataParallel
from lightning_fastmoe.errors import CheckpointError

CASES = [
    Case(),
    Case(accumulate=2),
    Case(world=2),
    Case(world=2, ep=2),
    Case(world=2, ep=2, accumulate=3),
    Case(world=4, ep=1, accumulate=2),
    Case(world=4, ep=2),
    Case(world=4, ep=2, accumulate=2, bucket_bytes=2**25),
    Case(world=4, ep=4),
    Case(world=4, ep="auto", bucket_bytes=1),
    Case(world=4, ep=2, tokens=1, dispatcher="dedup"),
    Case(world=4, ep=4, hot=True),
    Case(world=4, ep=2, accumulate=2, together=True),
    Case(world=4, ep=4, dispatcher="dedup", nodes=2),
    Case(world=4, ep=2, unequal=True),
]


def ident(case: Case) -> str:
    changed = {k: v for k, v in vars(case).items() if v != vars(Case())[k]}
    return "-".join(f"{k}{v}" for k, v in changed.items()) or "one"


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_equals_one_process(rank_pool, case):
    if case.world == 1:
        results = [runs.train(case)]
    else:
        per_node = case.world // case.nodes
        results = rank_pool.run(runs.train, case.world, case, ranks_per_node=per_node)
    runs.check(case, results)


@pytest.mark.parametrize("ep", [1, 4])
def test_resumes_on_another_size(rank_pool, tmp_path, ep):
    """Saved by torch.save on EP 2, read from the file: six steps equal six of one process."""
    saved = rank_pool.run(runs.save, 4, Case(world=4, ep=2), str(tmp_path / "state.pt"))
    assert saved == [None] * 4
    resumed = rank_pool.run(runs.resume, 4, Case(world=4, ep=ep), str(tmp_path / "state.pt"))
    right = runs.twin(Case(world=4), start=3, stop=6)
    trace = resumed[0]
    trace.losses = torch.tensor([t.losses for t in resumed]).mean(0).tolist()
    runs.assert_same(trace, right)


def test_full_states_are_those_of_one_process(rank_pool):
    """Names, order and shapes of plain PyTorch: they load into a model with all experts."""
    case = Case(world=4, ep=4)
    _, (model, optimizer), *_ = rank_pool.run(runs.train, 4, case)[0]
    plain = runs.build(case)
    assert sorted(model) == sorted(plain.state_dict())
    assert plain.load_state_dict(model).missing_keys == []
    groups = [list(group["params"]) for group in optimizer["param_groups"]]
    names = {id(p): n for n, p in plain.named_parameters()}
    right = [[names[id(p)] for p in g["params"]] for g in runs.make_optimizer(plain).param_groups]
    assert list(map(sorted, groups)) == list(map(sorted, right))
    for name, state in optimizer["state"].items():
        assert state["exp_avg"].shape == plain.get_parameter(name).shape
        assert float(state["step"]) == 3


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_equals_torch(rank_pool, norm_type):
    """On EP 2 with replicas, against torch's function on gradients of the whole model."""
    case = Case(world=4, ep=2)
    (norm, clipped), *others = rank_pool.run(runs.clip, 4, case, norm_type)
    assert [n for n, _ in others] == [norm] * 3
    net = runs.build(case)
    for chunk in runs.make_batches(case)[0, 0]:
        ((net(chunk) + sum(moe_losses(net).values())) / 4).backward()
    right = nn.utils.clip_grad_norm_(net.parameters(), 0.05, norm_type)
    assert norm == pytest.approx(float(right), rel=1e-6)
    for name, gradient in runs.gradients(net).items():
        torch.testing.assert_close(clipped[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dtype", "right"), [(torch.float32, 140.0), (None, 139.0)])
def test_bf16_is_summed_in_the_dtype_that_is_asked_for(rank_pool, dtype, right):
    """Next to 256 and 300, whose neighbours are 2 away, 1 is lost in bf16: 556 / 4, not 558 / 4."""
    for found in rank_pool.run(runs.reduce_bf16, 4, dtype):
        assert found.dtype == torch.bfloat16
        assert float(found[0]) == right


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_complex_gradients_keep_their_imaginary_parts(rank_pool, dtype):
    right = (0.5 + 2j, pytest.approx(4.25**0.5))
    assert rank_pool.run(runs.reduce_complex, 2, dtype) == [right, right]


def test_transformers_models_train_in_place(rank_pool):
    """Qwen3-MoE on EP 2 with replicas equals the same model in one process."""
    right = runs.transformers_twin()
    for found in rank_pool.run(runs.transformers_run, 4):
        assert found.keys() == (right.keys() if found else set())
        for name, weight in found.items():
            torch.testing.assert_close(weight, right[name], rtol=1e-6, atol=1e-7)


def test_experts_built_on_their_own_rank_stay_as_they_are(rank_pool):
    """As a model that does not fit into one rank's memory is built."""
    whole = runs.build(Case(world=2)).state_dict()
    full, _ = rank_pool.run(runs.placed, 2)
    assert full.keys() == whole.keys()
    assert all(torch.equal(full[name], value) for name, value in whole.items())


def test_names_that_torch_keeps_in_groups_are_each_ranks_own():
    net = runs.build(Case())
    parallel = ExpertDataParallel(net)
    optimizer = torch.optim.AdamW(net.named_parameters())
    own = list(optimizer.param_groups[0]["param_names"])
    state = parallel.full_optimizer_state_dict(optimizer)
    assert "param_names" not in state["param_groups"][0]
    parallel.load_full_optimizer_state_dict(optimizer, state)
    assert optimizer.param_groups[0]["param_names"] == own


def test_loading_refuses_other_groups():
    net = runs.build(Case())
    parallel = ExpertDataParallel(net)
    optimizer = runs.make_optimizer(net)
    state = parallel.full_optimizer_state_dict(optimizer)
    one = torch.optim.AdamW(net.parameters())
    with pytest.raises(CheckpointError, match="1 parameter groups, but the saved one had 2"):
        parallel.load_full_optimizer_state_dict(one, state)
    state["param_groups"].reverse()
    with pytest.raises(CheckpointError, match="is in group 0 of the optimizer, but was not"):
        parallel.load_full_optimizer_state_dict(optimizer, state)
    foreign = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(CheckpointError, match=r"shape \(3,\) that is not one of the wrapped"):
        parallel.full_optimizer_state_dict(foreign)


def test_loading_refuses_other_numbers_of_experts(rank_pool):
    for message in rank_pool.run(runs.load_too_few, 2):
        assert "has 2 rows in the loaded state, but the layer has 8 experts" in message


def test_saving_refuses_optimizers_of_some_ranks(rank_pool):
    for message in rank_pool.run(runs.save_unequal_optimizers, 2):
        assert "moes.0.experts.up_proj/" in message
        assert "exists on 1 of 2 ranks" in message


def test_loaded_optimizer_states_do_not_keep_the_whole_in_memory(rank_pool):
    assert rank_pool.run(runs.bytes_of_loaded_state, 2) == [(256, 256)] * 2


@pytest.mark.parametrize(("ids", "others"), [([1], [3]), ([0, 1], [1, 2]), ([0, 1, 2], [0, 1, 3])])
def test_whole_optimizer_states_of_single_experts(ids, others, rank_pool):
    """One rank has no trained expert, or as many as it has experts, and others fewer."""
    (alone, *_), *_ = rank_pool.run(runs.whole_state_of_single_experts, 1, ids, others)
    for state, loads, said in rank_pool.run(runs.whole_state_of_single_experts, 2, ids, others):
        assert loads
        assert f"{ids}}} there, {{'0.experts.trained': {others}}} here" in said
        assert state["trained_experts"] == {"0.experts.trained": ids}
        assert state["param_groups"] == alone["param_groups"]
        for name, values in alone["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(state["state"][name][key], value, rtol=1e-9, atol=1e-12)
