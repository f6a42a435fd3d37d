"""What hooks do to parameters holds as in plain PyTorch, or an error says what does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy.exactness import assert_close
from strategy.models import Case
from zero import edit_runs as runs

CASE = Case(world=2, ep=2, steps=4, coefficients=(0.0, 0.0), stage=2)
ALONE = replace(CASE, world=1, ep=1)
BIAS = ("head.bias",)
"""A parameter that no backward pass reads, so that plain PyTorch lets it change before one."""
PARTITIONED = {
    "config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
}


def partitioned(case: Case = CASE) -> Case:
    """ZeRO 3 that keeps no parameter whole, as it does with large ones."""
    return replace(case, stage=3, extra=PARTITIONED)


def check(trained, plain) -> None:
    assert trained.keys() == plain.keys()
    for name, weight in plain.items():
        assert_close(trained[name], weight, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("hook", runs.BEFORE_FORWARD + runs.AFTER_FORWARD + runs.AT_THE_END)
def test_a_weight_that_a_hook_writes_holds(rank_pool, hook, stage):
    if stage == 3 and hook in runs.IN_THE_FIRST_STEP:
        pytest.skip("no parameter is whole yet: see test_what_would_be_lost_raises")
    if stage == 3 and hook in ("on_before_backward", "on_before_zero_grad"):
        pytest.skip("autograd itself refuses: ZeRO 3's linear layers keep their biases for it")
    case = replace(CASE, stage=stage)
    names = BIAS if hook in runs.AFTER_FORWARD and hook != "lr_scheduler_step" else runs.EDITED
    plain = runs.plain(case, hook, "in_place", names)
    assert not torch.equal(plain["head.bias"], runs.plain(case, "", "in_place", ())["head.bias"])
    for trained in rank_pool.run(runs.fit, 2, case, hook, "in_place", names):
        check(trained, plain)


@pytest.mark.parametrize("case", [replace(ALONE, stage=1), replace(ALONE, stage=3), CASE])
@pytest.mark.parametrize(
    "edit", [e for e in runs.EDITS if e not in ("in_place", "halve_gradients")]
)
def test_however_it_is_written(rank_pool, case, edit):
    hook = "on_train_batch_end"
    names = ("head.bias", "embed.weight") if edit == "load" else runs.EDITED
    if edit == "one_element" and case.ep > 1:
        names = ("head.bias", "embed.weight")  # the last element of a rank's experts is another
    plain = runs.plain(case, hook, edit, names)
    for trained in rank_pool.run(runs.fit, case.world, case, hook, edit, names):
        check(trained, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rate_that_a_hook_sets_holds(rank_pool, stage):
    case, hooks = replace(CASE, stage=stage), runs.BEFORE_FORWARD + runs.AFTER_FORWARD
    plain = {hook: runs.plain_rates(case, hook) for hook in hooks}
    for trained in rank_pool.run(runs.rates, 2, case, hooks):
        for hook in hooks:
            check(trained[hook], plain[hook])


@pytest.mark.parametrize("case", [replace(CASE, stage=1), CASE, partitioned()])
def test_a_hook_on_a_parameter_changes_its_gradient(rank_pool, case):
    # A change by a factor shows in AdamW with an eps of that size.
    plain = runs.plain(case, "on_train_start", "halve_gradients", runs.EDITED)
    for trained in rank_pool.run(
        runs.fit, 2, case, "on_train_start", "halve_gradients", runs.EDITED
    ):
        check(trained, plain)


def test_a_large_parameter_that_zero_3_still_has_whole(rank_pool):
    # After validation DeepSpeed keeps some, which the next forward pass frees.
    hook, names = "on_train_batch_start", ("embed.weight",)
    for edit in ("in_place", "assign_data"):
        plain = runs.plain(CASE, hook, edit, names)
        for trained in rank_pool.run(runs.fit, 2, partitioned(), hook, edit, names):
            check(trained, plain)


@pytest.mark.parametrize("stage", [2, 3])
def test_with_the_optimizer_on_the_host(rank_pool, stage):
    case = replace(CASE, stage=stage, extra={"offload_optimizer": True})
    for edit in ("in_place", "clamp_data"):
        plain = runs.plain(case, "on_train_batch_start", edit, runs.EDITED)
        for trained in rank_pool.run(runs.fit, 2, case, "on_train_batch_start", edit, runs.EDITED):
            check(trained, plain)


@pytest.mark.parametrize(
    ("hook", "edit"),
    [("on_fit_start", "in_place"), ("on_train_start", "assign_data")]
    + [("on_train_batch_end", "clamp_data")],
)
@pytest.mark.parametrize("case", [CASE, partitioned(), partitioned(ALONE)])
def test_the_helper_writes_at_every_stage(rank_pool, case, hook, edit):
    plain = runs.plain(case, hook, edit, runs.EDITED)
    for trained in rank_pool.run(runs.with_helper, case.world, case, hook, edit, runs.EDITED):
        check(trained, plain)


@pytest.mark.parametrize("case", [replace(CASE, stage=3), partitioned()])
def test_deepspeeds_modifier_rank_writes(rank_pool, case):
    plain = runs.plain(case, "on_train_batch_start", "in_place", ("head.bias", "embed.weight"))
    for trained in rank_pool.run(runs.modifier_rank, 2, case):
        check(trained, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_elements_that_were_not_written_keep_the_masters_precision(rank_pool, stage):
    case = replace(CASE, stage=stage, precision="bf16-mixed")
    for before, after, weight in rank_pool.run(runs.precision_of_the_rest, 2, case):
        assert not torch.equal(before, before.bfloat16().float())
        assert torch.equal(after.view(-1)[:-1], before.view(-1)[:-1])
        assert after.view(-1)[-1] == 0.25 == weight.view(-1)[-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_save_right_after_the_edit_has_it(rank_pool, tmp_path, stage):
    case = replace(CASE, stage=stage)
    for straight, resumed in rank_pool.run(runs.saved_after_edit, 2, case, str(tmp_path / "c")):
        for name, weight in straight.items():
            assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize("case", [replace(CASE, stage=1), CASE, partitioned()])
def test_a_checkpoint_is_loaded_over_an_edit(rank_pool, tmp_path, case):
    for alone, edited in rank_pool.run(runs.loaded_over_edit, 2, case, str(tmp_path / "c")):
        for name, weight in alone.items():
            assert torch.equal(edited[name], weight), name


HELPER = "with trainer.strategy.edit_parameters([parameter]):"
STAGES = (replace(CASE, stage=1), CASE, replace(CASE, stage=3))


@pytest.mark.parametrize(
    ("cases", "hook", "edit", "steps", "named"),
    [
        (STAGES, "on_train_batch_start", "freeze", 2, ["'net.head.bias'", "lr to 0"]),
        (STAGES, "on_train_start", "freeze", 0, ["'net.head.bias'", "configure_model"]),
        (STAGES, "on_train_batch_end", "unfreeze", 3, ["'net.norm.bias'", "lr is 0"]),
        (STAGES, "on_train_batch_end", "replace_parameter", 3, ["'net.head.bias'", "copy_("]),
        (STAGES, "on_train_batch_start", "assign_state", 2, ["'net.norm.weight'", "assign=True"]),
        (STAGES[:2], "on_before_optimizer_step", "other_shape", 2, ["[3]", "[1]"]),
        (
            STAGES,
            "on_before_optimizer_step",
            "set_gradient",
            2,
            ["'net.head.bias'", "register_hook"],
        ),
        ([STAGES[2]], "on_fit_start", "write_partitioned", 0, ["'net.embed.weight'", HELPER]),
        ([partitioned()], "on_train_batch_end", "write_partitioned", 3, ["written to", HELPER]),
        ([partitioned()], "on_train_start", "assign_partitioned", 0, ["new data", HELPER]),
        ([partitioned()], "on_train_batch_end", "write_gathered", 3, ["written to", HELPER]),
    ],
)
def test_what_would_be_lost_raises(rank_pool, cases, hook, edit, steps, named):
    for case in cases:
        for name, message, done in rank_pool.run(runs.error_of, 2, case, hook, edit):
            assert name == "ParameterEditError", message
            assert done == steps
            for part in named:
                assert part in message


def test_a_rank_that_refuses_stops_all(rank_pool):
    # After the backward pass: before, ranks would reduce gradients of different sizes.
    hook = "on_before_optimizer_step"
    results = rank_pool.run(runs.error_of, 2, CASE, hook, "freeze_on_one_rank")
    (first, others, _), (second, own, _) = results
    assert (first, second) == ("ParameterEditError",) * 2
    assert "Another rank" in others
    assert "'net.head.bias'" in own
