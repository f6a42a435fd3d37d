"""``optimizer.param_groups`` is what the user wrote: what is set there is what the step uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy.exactness import assert_close
from strategy.models import Case
from zero import user_group_runs as runs

from lightning_fastmoe.zero.param_groups import UserParamGroups

CASE = Case(world=2, ep=2, steps=runs.STEPS, coefficients=(0.0, 0.0))
ALONE = replace(CASE, world=1, ep=1)


def check(trained: runs.Seen, plain: runs.Seen) -> None:
    assert trained.groups == plain.groups
    assert trained.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert_close(trained.weights[name], weight, name)


@pytest.mark.parametrize(
    ("kind", "scheduler", "edit"),
    [
        ("adamw", "none", "rate_by_index"),
        ("adamw", "none", "other_options"),
        ("tensor rate", "none", "tensor_rate"),
        ("tensor rate", "exponential", "tensor_rate"),
        ("sgd", "none", "momentum"),
        ("sgd", "cosine", "momentum"),
        ("counting", "none", "rate_by_index"),
        *(("adamw", s, "rate_by_index") for s in runs.SCHEDULERS if s != "none"),
    ],
)
def test_what_is_set_in_a_group_is_what_its_parameters_train_with(rank_pool, kind, scheduler, edit):
    plain = runs.plain(CASE, kind, scheduler, edit)
    assert len({str(groups) for groups in plain.groups}) > 1, "the edit must do something"
    for trained in rank_pool.run(runs.fit, 2, CASE, kind, scheduler, edit):
        check(trained, plain)


@pytest.mark.parametrize("scheduler", ["none", "step", "plateau"])
@pytest.mark.parametrize("case", [replace(CASE, stage=1), replace(CASE, stage=3), ALONE])
def test_at_every_stage_and_on_one_rank(rank_pool, case, scheduler):
    plain = runs.plain(case, "adamw", scheduler, "rate_by_index")
    for trained in rank_pool.run(runs.fit, case.world, case, "adamw", scheduler, "rate_by_index"):
        check(trained, plain)


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("adamw", "step"), ("tensor rate", "exponential"), ("counting", "none")]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_has_the_values_that_were_set(rank_pool, tmp_path, stage, kind, scheduler):
    case = replace(CASE, stage=stage)
    edit = "tensor_rate" if kind == "tensor rate" else "rate_by_index"
    path = str(tmp_path / "c.ckpt")
    whole = rank_pool.run(runs.fit, 2, case, kind, scheduler, edit, (4, path))[0]
    rest = rank_pool.run(runs.fit, 2, case, kind, scheduler, edit, None, path)[0]
    assert rest.groups == whole.groups[4:]
    for name, weight in whole.weights.items():
        assert torch.equal(rest.weights[name], weight), name


@pytest.mark.parametrize(
    ("misuse", "error", "named"),
    [
        ("wrapped", "ConfigError", ["Wrapping", "'base'"]),
        ("replaced step", "ConfigError", ["AdamW", "subclass"]),
        ("step", "ConfigError", ["self.optimizers().step()"]),
        ("add group", "ParameterGroupError", ["add_param_group()", "configure_optimizers()"]),
        ("move parameter", "ParameterGroupError", ["param_groups has changed", "lr=0"]),
        ("reverse groups", "ParameterGroupError", ["param_groups has changed"]),
        ("state_dict", "ConfigError", ["save_checkpoint()"]),
        ("load_state_dict", "ConfigError", ["ckpt_path"]),
    ],
)
def test_what_would_be_lost_raises(rank_pool, misuse, error, named):
    for name, message in rank_pool.run(runs.error_of, 2, CASE, misuse):
        assert name == error, message
        for part in named:
            assert part in message


def test_every_misuse_is_tested():
    marks = test_what_would_be_lost_raises.pytestmark
    assert {misuse for misuse, *_ in marks[0].args[1]} == runs.MISUSE.keys()


def test_an_optimizer_that_the_module_keeps_serves_two_fits(rank_pool):
    [((first, second), classes)] = rank_pool.run(runs.fit_twice, 1, ALONE)
    assert classes == ["SGD"] * 3
    plain = runs.plain(ALONE, "sgd", "step", "")
    rates = [[group["lr"] for group in step] for step in plain.groups]
    assert [[group["lr"] for group in step] for step in first.groups] == rates
    # The second goes on from where the first one's scheduler left the rate, as in plain PyTorch.
    start = rates[-1][0] / 2
    assert [step[0]["lr"] for step in second.groups] == [start / 2 ** (i // 2) for i in range(6)]


def test_values_also_reach_the_optimizer_of_partitions_that_stay_on_the_gpu():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, twin, backup = (torch.optim.AdamW([weight], lr=1.0) for _ in range(3))
    groups = UserParamGroups(optimizer, {id(weight): "w"}, twin, [0])

    class Zero:
        backup_optimizer = backup

        def zero_grad(self, set_to_none: bool = True) -> None: ...

    groups.attach(Zero())
    optimizer.param_groups[0].update(lr=0.5, betas=(0.1, 0.2))
    groups.push()
    for stepper in (twin, backup):
        assert stepper.param_groups[0]["lr"] == 0.5
        assert stepper.param_groups[0]["betas"] == (0.1, 0.2)


def test_a_value_that_the_saving_run_trained_with_wins_over_one_that_was_only_shown():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    names = {id(w): f"w{i}" for i, w in enumerate(weights)}
    optimizer = torch.optim.SGD(weights, lr=1.0)
    twin = torch.optim.SGD([{"params": [w]} for w in weights], lr=0.25)  # restored before
    groups = UserParamGroups(optimizer, names, twin, [0, 0])
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    groups.load_named([{"params": ["w0", "w1"], "options": options}], "c.ckpt")
    assert optimizer.param_groups[0]["lr"] == 0.25
    groups.push()
    assert [group["lr"] for group in twin.param_groups] == [0.25, 0.25]
