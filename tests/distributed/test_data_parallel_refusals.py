"""What would train wrongly or hang in a plain loop is an error on every rank."""

from __future__ import annotations

import re

import pytest
import torch
from distributed import data_parallel_refusals as runs
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_fastmoe import moe_losses
from lightning_fastmoe.distributed import ExpertDataParallel
from lightning_fastmoe.distributed.data_parallel.contents import Item
from lightning_fastmoe.distributed.data_parallel.unreduced import UnreducedGradients
from lightning_fastmoe.errors import ConfigError, TopologyError

MESSAGES = {
    "new_parameter": ("ConfigError", "late.weight was not in the model .*(rank 1)"),
    "reduced_twice": ("ConfigError", "dense.weight has already been averaged"),
    "reduced_after_each_batch": ("ConfigError", "once for each step, after all"),
    "backward_after_reduction": ("ConfigError", "dense.weight has already been averaged"),
    "not_set_to_none": ("ConfigError", "set_to_none=True"),
    "stepped_first": (
        "ConfigError",
        r"AdamW.step\(\): the gradient of dense.weight is this rank's",
    ),
    "stepped_by_closure": ("ConfigError", r"SGD.step\(\): .* Call reduce_gradients\(\)"),
    "unfrozen_and_stepped": ("ConfigError", r"SGD.step\(\): the gradient of dense.weight is this"),
    "clipped_first": ("ConfigError", "dense.weight is this rank's own.*reduce_gradients"),
    "clipped_between": ("ConfigError", "dense.weight is this rank's own.*reduce_gradients"),
    "clipped_by_torch": ("ConfigError", "changed differently .* clip_grad_norm_ of ExpertData"),
    "skipped_step": ("ConfigError", "different numbers of optimizer steps.*GradScaler"),
    "inside_ddp": ("ConfigError", "inside DistributedDataParallel"),
    "unknown_scale": ("ConfigError", r"parallel.backward\(loss, divisor=...\)"),
    "frozen_on_one_rank": ("ConfigError", "dense.weight is frozen .* on some ranks only"),
    "sparse_gradient": ("ConfigError", "dense.weight is sparse"),
    "nonfinite_on_one_rank": ("NonFiniteError", "NaN or Inf on some rank"),
    "nonfinite_norm": ("RuntimeError", "order 2.0 of all gradients is inf"),
    "skipped_layer": ("ExchangeError", "different exchanges"),
    "saved_before_the_last_batch": ("ExchangeError", "different exchanges"),
    "saved_optimizer_before_the_last_batch": ("ExchangeError", "different exchanges"),
}

SET_UP = {
    "another size": ("TopologyError", "holds 2 of its 4 experts .* expert_parallel_size=1"),
    "indivisible": ("TopologyError", "does not divide num_experts=3 of layer 'odd'"),
    "ranks": ("TopologyError", r"expert_parallel_size=3 does not divide the world of 2 rank"),
    "another model": ("TopologyError", "Rank 1 has built another model than rank 0.*dense.bias"),
    "another number": ("TopologyError", "Rank 1 .*moe with 3 experts.* in place of moe with 4"),
    "another dispatcher": ("TopologyError", "dispatcher='symmetric' in place of .*'auto'"),
    "exact on one rank": ("TopologyError", "'auto', exact=True in place of .*'auto'. Build"),
    "another size on one rank": ("TopologyError", "expert_parallel_size is 2 on rank 0 and 1 on"),
    "another node": ("TopologyError", "ranks_per_node is 2 on rank 0 and 1 on rank 1"),
    "one batch norm": ("ConfigError", "moe.experts.1 is a SyncBatchNorm"),
    "one nested": ("ConfigError", "moe.experts.1 is a MoE layer inside"),
    "only here": ("ConfigError", r"dense.shared is also a parameter of .*\(rank 1\)"),
    "another seed": ("ConfigError", "Rank 1 built its MoE layers from another seed"),
    "tied": ("ConfigError", "other.shared is also a parameter of sharded experts"),
    "wrapped": ("ConfigError", "DistributedDataParallel.*model.module"),
    "meta": ("ConfigError", "dense.weight is on the meta device"),
    "batch norm": ("ConfigError", "moe.experts.[02] is a SyncBatchNorm"),
    "nested": ("ConfigError", "moe.experts.* is a MoE layer inside a sharded expert"),
}


def test_each_case_is_run():
    assert [run.__name__ for run in runs.DURING] == list(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_refused_on_every_rank_in_training(rank_pool, name):
    kind, message = MESSAGES[name]
    for error, text in rank_pool.run(runs.fails_in_training, 2, name):
        assert error == kind, text
        assert re.search(message, text), text


@pytest.mark.parametrize("how", ["scaled", "clipped", "replaced", "by torch without experts"])
def test_gradients_may_be_changed_in_the_same_way(rank_pool, how):
    rank_pool.run(runs.changes_identically, 2, how)


@pytest.mark.parametrize("name", SET_UP)
def test_refused_on_every_rank_at_set_up(rank_pool, name):
    kind, message = SET_UP[name]
    for error, text in rank_pool.run(runs.fails_to_wrap, 2, name):
        assert error == kind, text
        assert re.search(message, text), text


@pytest.mark.parametrize("dispatcher", ["all_to_all", "symmetric"])
def test_waits_for_other_ranks_end(rank_pool, dispatcher):
    """Also those for memory, in which no collective has a time limit."""
    alone, _ = rank_pool.run(runs.waits_for_nobody, 2, dispatcher)
    assert re.match(r"ExchangeError: moe, exchange of tokens number \d, phase counts", alone)
    if dispatcher == "symmetric":
        assert "has waited 2 s for the other ranks (timeout=2)" in alone
        assert "ExpertDataParallel(timeout=...)" in alone
        assert "Missing: rank 1 of the expert parallel group" in alone


def test_sizes_without_a_process_group(monkeypatch):
    model = runs.net()
    with pytest.raises(TopologyError, match="expert_parallel_size=2 .* no process group"):
        ExpertDataParallel(model, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TopologyError, match="WORLD_SIZE=2, but this process has no process group"):
        ExpertDataParallel(model)


def test_some_experts_without_a_process_group():
    model = runs.net()
    model["moe"].experts.keep([0, 1])
    with pytest.raises(TopologyError, match="only some of its experts"):
        ExpertDataParallel(model, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_bytes": 0}, "bucket_bytes=0 must be positive"),
        ({"reduce_dtype": torch.int32}, "reduce_dtype=torch.int32 must be a floating"),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ExpertDataParallel(runs.net(), **options)


def test_norms_without_order():
    parallel = ExpertDataParallel(runs.net())
    with pytest.raises(ConfigError, match="norm_type=0 must be positive"):
        parallel.clip_grad_norm_(1.0, norm_type=0)


def test_divisors():
    parallel = ExpertDataParallel(runs.net())
    with pytest.raises(ConfigError, match="divisor=0 must be positive"):
        parallel.backward(runs.loss_of(parallel.model), divisor=0)


def test_a_model_without_parameters():
    with pytest.raises(ConfigError, match="no parameters"):
        ExpertDataParallel(nn.ReLU())


def test_compiled_layers_need_the_scale_of_the_loss_too():
    """A graph can't ask for it; with it, its balancing losses have the same divisor."""
    model, twin = runs.net(), runs.net()
    model.double(), twin.double()
    parallel = ExpertDataParallel(model)
    compiled = torch.compile(model["moe"], backend="aot_eager", fullgraph=True)
    x = torch.randn(5, runs.D, dtype=torch.float64)
    compiled(model["dense"](x)).square().mean().backward()
    with pytest.raises(ConfigError, match=r"parallel.backward\(loss, divisor=...\)"):
        parallel.reduce_gradients()
    model.zero_grad()
    parallel.backward(compiled(model["dense"](x)).square().mean(), divisor=4)
    parallel.reduce_gradients()
    loss = twin["moe"](twin["dense"](x)).square().mean() + sum(moe_losses(twin).values())
    (loss / 4).backward()
    for own, right in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-9, atol=1e-12)


def test_errors_name_the_layer():
    model = runs.net()
    ExpertDataParallel(model)
    assert model["moe"].layer_name == "moe"


@pytest.mark.parametrize("before", [True, False])
def test_nan_is_ignored_where_the_layer_says_so(before):
    model = runs.net()
    if before:
        model["moe"].nonfinite_policy = "ignore"
    parallel = ExpertDataParallel(model)
    if not before:
        model["moe"].nonfinite_policy = "ignore"
    parallel.backward(model["moe"](torch.full((3, runs.D), torch.nan)).sum())
    parallel.reduce_gradients()
    assert not parallel.clip_grad_norm_(1.0).isfinite()


def test_balancing_losses_added_by_hand_need_no_scale():
    """And without balancing losses there is none to know."""
    for options, by_hand in (({}, True), ({"load_balancing": 0.0, "z_loss": 0.0}, False)):
        model = runs.net(**options)
        parallel = ExpertDataParallel(model)
        loss = runs.loss_of(model)
        (loss + (sum(moe_losses(model).values()) if by_hand else 0.0)).backward()
        parallel.reduce_gradients()
        twin = runs.net(**options)
        runs.loss_of(twin).backward()
        right = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        torch.testing.assert_close(parallel.clip_grad_norm_(1.0), right)


def test_a_single_rank_and_a_wrapper_that_is_gone_step_as_they_like():
    model = nn.Linear(2, 2)
    parallel = ExpertDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parallel.backward(model(torch.ones(1, 2)).sum())
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_hooks_end_with_the_wrapper():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    items = [Item(name, p, False) for name, p in model.named_parameters()]
    hooks = len(_global_optimizer_pre_hooks)
    watch = UnreducedGradients(model, items)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConfigError, match="the gradient of weight is this rank's own"):
        optimizer.step()
    watch.reduced()
    optimizer.step()
    optimizer.zero_grad()
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad()  # dropped
    optimizer.step()
    model(torch.ones(1, 2)).sum().backward()
    del watch
    assert len(_global_optimizer_pre_hooks) == hooks
    optimizer.step()
