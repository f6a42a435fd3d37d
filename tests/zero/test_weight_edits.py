"""What hooks do to parameters holds as in plain PyTorch, or an error says what does."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_close
from strategy.models import D_IN, Case, Net, RankBatches, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, over_expert_ranks, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe.zero.module_tree import ModuleTree

EDITED = ("head.bias", "embed.weight", "moes.0.experts.up_proj", "moes.1.router.weight")
AT = 2
"""The step in whose hooks weights are written."""


def chosen(net: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    parameters = dict(net.named_parameters())
    return [parameters[name] for name in names]


def in_place(net: nn.Module, names: tuple[str, ...]) -> None:
    """As nn.init and load_state_dict() do."""
    with torch.no_grad():
        for p in chosen(net, names):
            p.mul_(0.5).add_(0.01)


def one_element(net: nn.Module, names: tuple[str, ...]) -> None:
    with torch.no_grad():
        for p in chosen(net, names):
            p.view(-1)[-1] = 0.25


def detached(net: nn.Module, names: tuple[str, ...]) -> None:
    for p in chosen(net, names):
        p.detach().mul_(0.5)


def foreach(net: nn.Module, names: tuple[str, ...]) -> None:
    with torch.no_grad():
        torch._foreach_mul_(chosen(net, names), 0.5)


def clamp_data(net: nn.Module, names: tuple[str, ...]) -> None:
    """As a Wasserstein critic's weights are clipped."""
    for p in chosen(net, names):
        p.data.clamp_(-0.05, 0.05)


def assign_data(net: nn.Module, names: tuple[str, ...]) -> None:
    for p in chosen(net, names):
        p.data = p.data * 0.5


def load(net: nn.Module, names: tuple[str, ...]) -> None:
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for name in names:
        state[name] *= 0.5
    net.load_state_dict(state)


def two_ways(net: nn.Module, names: tuple[str, ...]) -> None:
    """The host knows of one edit, and only samples show the others."""
    in_place(net, names[:1])
    clamp_data(net, names[1:])


EDITS: dict[str, Callable[[nn.Module, tuple[str, ...]], None]] = {
    f.__name__: f
    for f in (in_place, one_element, detached, foreach, clamp_data, assign_data, load, two_ways)
}

BEFORE_FORWARD = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "before optimizer.step",
    "after optimizer.step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
)
AFTER_FORWARD = (
    "on_before_backward",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "lr_scheduler_step",
)
AT_THE_END = ("on_train_end",)
IN_THE_FIRST_STEP = ("on_fit_start", "on_train_start")
AFTER_THE_STEP = (
    "after optimizer.step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "lr_scheduler_step",
)


class Edited(Net):
    """Calls an edit in one hook of one step; an epoch has one step, to be in all hooks."""

    def __init__(self, case: Case, hook: str, edit: Callable[[Edited], None]) -> None:
        super().__init__(case)
        self.hook, self.edit, self.count = hook, edit, 0

    def at(self, hook: str) -> None:
        wanted = 0 if hook in IN_THE_FIRST_STEP + AT_THE_END else AT
        if hook == self.hook and (hook in AT_THE_END or self.step() == wanted):
            self.count += 1
            self.edit(self)

    def step(self) -> int:
        done = self.hook in AFTER_THE_STEP and self.hook != "after optimizer.step"
        return self.trainer.global_step - (1 if done else 0)

    def on_fit_start(self) -> None:
        self.at("on_fit_start")

    def on_train_start(self) -> None:
        self.at("on_train_start")

    def on_train_end(self) -> None:
        self.at("on_train_end")

    def on_train_epoch_start(self) -> None:
        self.at("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self.at("on_train_epoch_end")

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.at("on_train_batch_start")

    def on_train_batch_end(self, *args: Any) -> None:
        self.at("on_train_batch_end")

    def on_before_backward(self, loss: Tensor) -> None:
        self.at("on_before_backward")

    def on_after_backward(self) -> None:
        self.at("on_after_backward")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.at("on_before_zero_grad")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.at("on_before_optimizer_step")

    def on_validation_start(self) -> None:
        self.at("on_validation_start")

    def on_validation_end(self) -> None:
        self.at("on_validation_end")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        self.at("lr_scheduler_step")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        self.at("before optimizer.step")
        optimizer.step(closure=closure)
        self.at("after optimizer.step")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.at("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss_of(self.net, batch)

    def train_dataloader(self) -> Any:
        step = self.trainer.current_epoch
        batches = make_batches(self.case)[min(step, self.case.steps - 1)]
        return DataLoader(RankBatches(batches[:, self.trainer.global_rank]), batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(RankBatches(torch.zeros(1, 2, 3, D_IN)), batch_size=None)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net, self.case.fused)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_optimizer(net: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3, fused=fused or None)


def trainer_for(case: Case, **kwargs: Any) -> pl.Trainer:
    return make_trainer(
        replace(case, extra=deepcopy(case.extra)),  # Lightning writes into a config
        gradient_clip_val=None,
        max_epochs=case.steps,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        **kwargs,
    )


def fit(case: Case, hook: str, edit: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights after a fit with an edit in one hook."""
    pl.seed_everything(7, verbose=False)
    module = Edited(case, hook, lambda m: EDITS[edit](m.net, names))
    trainer_for(case).fit(module)
    assert module.count == 1
    return masters(module.net)


def masters(net: nn.Module) -> dict[str, Tensor]:
    """The weights that ZeRO trains, whole; those of experts over the rank's own alone."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = whole_weights(net)
    for name, parameter in net.named_parameters():
        own = safe_get_full_fp32_param(parameter)
        if whole[name].shape == own.shape:
            torch.testing.assert_close(whole[name], own, rtol=0, atol=0)
    return whole


def twin(case: Case, hook: str, edit: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same in one process, in plain PyTorch."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer = make_optimizer(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    at = 0 if hook in IN_THE_FIRST_STEP else AT
    for i, step in enumerate(make_batches(case)):
        if i == at and hook in BEFORE_FORWARD and hook not in AFTER_THE_STEP:
            EDITS[edit](net, names)
        optimizer.zero_grad()
        chunks = [b for micro in step for b in micro]
        for chunk in chunks:
            (loss_of(net, chunk) / len(chunks)).backward()
        if i == at and hook in AFTER_FORWARD and hook not in AFTER_THE_STEP:
            EDITS[edit](net, names)
        optimizer.step()
        scheduler.step()
        if i == at and hook in AFTER_THE_STEP:
            EDITS[edit](net, names)
    if hook in AT_THE_END:
        EDITS[edit](net, names)
    return {n: p.detach() for n, p in net.named_parameters()}


def with_helper(case: Case, hook: str, edit: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """As :func:`fit`, inside strategy.edit_parameters()."""
    pl.seed_everything(7, verbose=False)

    def change(module: Edited) -> None:
        strategy: Any = module.trainer.strategy
        with strategy.edit_parameters(chosen(module.net, names)):
            EDITS[edit](module.net, names)

    module = Edited(case, hook, change)
    trainer_for(case).fit(module)
    assert module.count == 1
    return masters(module.net)


def freeze(module: Edited) -> None:
    module.net["head"].bias.requires_grad_(False)


def unfreeze(module: Edited) -> None:
    module.net["norm"].bias.requires_grad_(True)


def replace_module(module: Edited) -> None:
    head = module.net["head"]
    module.net["head"] = nn.Linear(*reversed(head.weight.shape), device=head.weight.device)


def replace_parameter(module: Edited) -> None:
    module.net["head"].bias = nn.Parameter(torch.zeros(1))


def assign_state(module: Edited) -> None:
    state = {k: v.clone() for k, v in module.net["norm"].state_dict().items()}
    module.net["norm"].load_state_dict(state, assign=True)


def other_shape(module: Edited) -> None:
    module.net["head"].bias.data = torch.zeros(3)


def write_partitioned(module: Edited) -> None:
    with torch.no_grad():
        module.net["embed"].weight.fill_(1.0)


def assign_partitioned(module: Edited) -> None:
    module.net["embed"].weight.data = torch.zeros(12, D_IN)


def write_gathered(module: Edited) -> None:
    """As DeepSpeed documents it for reading: what is written there is dropped."""
    import deepspeed

    weight = module.net["embed"].weight
    with deepspeed.zero.GatheredParameters([weight]), torch.no_grad():
        weight.mul_(2.0)


def freeze_on_one_rank(module: Edited) -> None:
    if module.trainer.global_rank == 1:
        freeze(module)


def set_gradient(module: Edited) -> None:
    module.net["head"].bias.grad = torch.ones(1)


REFUSED = {
    f.__name__: f
    for f in (
        freeze,
        unfreeze,
        replace_parameter,
        replace_module,
        assign_state,
        other_shape,
        write_partitioned,
        assign_partitioned,
        write_gathered,
        freeze_on_one_rank,
        set_gradient,
    )
}


def error_of(case: Case, hook: str, edit: str) -> tuple[str, str, int]:
    """The error that a fit ends with, and after how many steps."""
    module = Edited(case, hook, REFUSED[edit])
    if edit == "unfreeze":
        module.net["norm"].bias.requires_grad_(False)
    trainer = trainer_for(case)
    try:
        trainer.fit(module)
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error), trainer.global_step
    return "", "no error", trainer.global_step


def halve_gradients(net: nn.Module, names: tuple[str, ...]) -> None:
    for p in chosen(net, names):
        p.register_hook(lambda gradient: gradient * 0.5)


EDITS["halve_gradients"] = halve_gradients


def modifier_rank(case: Case) -> dict[str, Tensor]:
    """DeepSpeed's own way to write at stage 3, on rank 0 alone."""
    import deepspeed

    pl.seed_everything(7, verbose=False)

    def change(module: Edited) -> None:
        parameters = chosen(module.net, ("head.bias", "embed.weight"))
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            if module.trainer.global_rank == 0:
                with torch.no_grad():
                    for p in parameters:
                        p.mul_(0.5).add_(0.01)

    module = Edited(case, "on_train_batch_start", change)
    trainer_for(case).fit(module)
    return masters(module.net)


def precision_of_the_rest(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Masters of a weight before and after one element of it was written, and the weight."""
    from deepspeed.utils import safe_get_full_fp32_param

    pl.seed_everything(7, verbose=False)
    found = []

    def change(module: Edited) -> None:
        weight = module.net["embed"].weight
        found.append(safe_get_full_fp32_param(weight).clone())
        one_element(module.net, ("embed.weight",))
        module.trainer.strategy.deepspeed_engine.take_over_edits()
        found.append(safe_get_full_fp32_param(weight).clone())
        found.append(weight.detach().clone())

    trainer_for(case).fit(Edited(case, "on_train_batch_start", change))
    before, after, weight = found
    return before, after, weight


def saved_after_edit(case: Case, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights right after an edit, and those of a run that resumes from a save right after it."""
    pl.seed_everything(7, verbose=False)
    found = []

    def change(module: Edited) -> None:
        in_place(module.net, EDITED)
        found.append({n: p.detach().clone() for n, p in module.net.named_parameters()})
        module.trainer.save_checkpoint(path)

    trainer_for(case).fit(Edited(case, "on_train_batch_start", change))
    resumed = Edited(case, "training_step", lambda m: found.append(masters(m.net)))
    trainer_for(case).fit(resumed, ckpt_path=path)
    own = dict(resumed.net.named_parameters())
    first = over_expert_ranks(resumed.net, found[0])
    assert own.keys() == first.keys()
    return first, found[1]


def loaded_over_edit(case: Case, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A resumed run, and one whose weights were also written before the checkpoint was loaded."""
    results = []
    pl.seed_everything(7, verbose=False)
    first = Edited(
        case, "on_train_batch_start", lambda module: module.trainer.save_checkpoint(path)
    )
    trainer_for(case).fit(first)

    def change(module: Edited, names: tuple[str, ...]) -> None:
        if case.stage != 3:
            assign_data(module.net, names)
            return
        with module.trainer.strategy.edit_parameters(chosen(module.net, names)):
            assign_data(module.net, names)

    for edit in ((), ("embed.weight", "head.bias")):
        module = Edited(case, "on_fit_start", lambda module, names=edit: change(module, names))
        trainer_for(case).fit(module, ckpt_path=path)
        results.append(masters(module.net))
    return results[0], results[1]


def set_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.02


def rates(case: Case, hooks: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Hook -> the weights of a run in which it sets the learning rate."""
    found = {}
    for hook in hooks:
        pl.seed_everything(7, verbose=False)
        module = Edited(case, hook, lambda m: set_rate(m.optimizers()))
        trainer_for(case).fit(module)
        assert module.count == 1
        found[hook] = masters(module.net)
    return found


def plain_rates(case: Case, hook: str) -> dict[str, Tensor]:
    """The same in one process, in plain PyTorch."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer = make_optimizer(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    at = 0 if hook in IN_THE_FIRST_STEP else AT
    for i, step in enumerate(make_batches(case)):
        if i == at and hook not in AFTER_THE_STEP:
            set_rate(optimizer)
        optimizer.zero_grad()
        chunks = [b for micro in step for b in micro]
        for chunk in chunks:
            (loss_of(net, chunk) / len(chunks)).backward()
        optimizer.step()
        if i == at and hook == "after optimizer.step":
            set_rate(optimizer)
        scheduler.step()
        if i == at and hook in AFTER_THE_STEP and hook != "after optimizer.step":
            set_rate(optimizer)
    return {n: p.detach() for n, p in net.named_parameters()}


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
@pytest.mark.parametrize("hook", BEFORE_FORWARD + AFTER_FORWARD + AT_THE_END)
def test_a_weight_that_a_hook_writes_holds(rank_pool, hook, stage):
    if stage == 3 and hook in IN_THE_FIRST_STEP:
        pytest.skip("no parameter is whole yet: see test_what_would_be_lost_raises")
    if stage == 3 and hook in ("on_before_backward", "on_before_zero_grad"):
        pytest.skip("autograd itself refuses: ZeRO 3's linear layers keep their biases for it")
    case = replace(CASE, stage=stage)
    names = BIAS if hook in AFTER_FORWARD and hook != "lr_scheduler_step" else EDITED
    plain = twin(case, hook, "in_place", names)
    assert not torch.equal(plain["head.bias"], twin(case, "", "in_place", ())["head.bias"])
    for trained in rank_pool.run(fit, 2, case, hook, "in_place", names):
        check(trained, plain)


@pytest.mark.parametrize(
    "case", [replace(ALONE, stage=1), replace(ALONE, stage=3), CASE, replace(CASE, fused=False)]
)
@pytest.mark.parametrize("edit", [e for e in EDITS if e not in ("in_place", "halve_gradients")])
def test_however_it_is_written(rank_pool, case, edit):
    hook = "on_train_batch_end"
    names = ("head.bias", "embed.weight") if edit == "load" else EDITED
    if edit == "one_element" and case.ep > 1:
        names = ("head.bias", "embed.weight")  # the last element of a rank's experts is another
    plain = twin(case, hook, edit, names)
    for trained in rank_pool.run(fit, case.world, case, hook, edit, names):
        check(trained, plain)


@pytest.mark.parametrize("case", [replace(ALONE, stage=2), replace(CASE, stage=1), CASE])
@pytest.mark.parametrize("edit", ["clamp_data", "two_ways"])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_what_only_samples_show_just_before_a_step(rank_pool, case, edit, hook):
    """With nothing before the step, such as a validation, that compares all samples."""
    plain = twin(case, hook, edit, EDITED)
    for trained in rank_pool.run(fit, case.world, case, hook, edit, EDITED):
        check(trained, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rate_that_a_hook_sets_holds(rank_pool, stage):
    case, hooks = replace(CASE, stage=stage), BEFORE_FORWARD + AFTER_FORWARD
    plain = {hook: plain_rates(case, hook) for hook in hooks}
    for trained in rank_pool.run(rates, 2, case, hooks):
        for hook in hooks:
            check(trained[hook], plain[hook])


@pytest.mark.parametrize("case", [replace(CASE, stage=1), CASE, partitioned()])
def test_a_hook_on_a_parameter_changes_its_gradient(rank_pool, case):
    # A change by a factor shows in AdamW with an eps of that size.
    plain = twin(case, "on_train_start", "halve_gradients", EDITED)
    for trained in rank_pool.run(fit, 2, case, "on_train_start", "halve_gradients", EDITED):
        check(trained, plain)


def test_a_large_parameter_that_zero_3_still_has_whole(rank_pool):
    # After validation DeepSpeed keeps some, which the next forward pass frees.
    hook, names = "on_train_batch_start", ("embed.weight",)
    for edit in ("in_place", "assign_data"):
        plain = twin(CASE, hook, edit, names)
        for trained in rank_pool.run(fit, 2, partitioned(), hook, edit, names):
            check(trained, plain)


@pytest.mark.parametrize("stage", [2, 3])
def test_with_the_optimizer_on_the_host(rank_pool, stage):
    case = replace(CASE, stage=stage, extra={"offload_optimizer": True})
    for edit in ("in_place", "clamp_data"):
        plain = twin(case, "on_train_batch_start", edit, EDITED)
        for trained in rank_pool.run(fit, 2, case, "on_train_batch_start", edit, EDITED):
            check(trained, plain)


@pytest.mark.parametrize(
    ("hook", "edit"),
    [("on_fit_start", "in_place"), ("on_train_start", "assign_data")]
    + [("on_train_batch_end", "clamp_data")],
)
@pytest.mark.parametrize("case", [CASE, partitioned(), partitioned(ALONE)])
def test_the_helper_writes_at_every_stage(rank_pool, case, hook, edit):
    plain = twin(case, hook, edit, EDITED)
    for trained in rank_pool.run(with_helper, case.world, case, hook, edit, EDITED):
        check(trained, plain)


@pytest.mark.parametrize("case", [replace(CASE, stage=3), partitioned()])
def test_deepspeeds_modifier_rank_writes(rank_pool, case):
    plain = twin(case, "on_train_batch_start", "in_place", ("head.bias", "embed.weight"))
    for trained in rank_pool.run(modifier_rank, 2, case):
        check(trained, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_elements_that_were_not_written_keep_the_masters_precision(rank_pool, stage):
    case = replace(CASE, stage=stage, precision="bf16-mixed")
    for before, after, weight in rank_pool.run(precision_of_the_rest, 2, case):
        assert not torch.equal(before, before.bfloat16().float())
        assert torch.equal(after.view(-1)[:-1], before.view(-1)[:-1])
        assert after.view(-1)[-1] == 0.25 == weight.view(-1)[-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_save_right_after_the_edit_has_it(rank_pool, tmp_path, stage):
    case = replace(CASE, stage=stage)
    for straight, resumed in rank_pool.run(saved_after_edit, 2, case, str(tmp_path / "c")):
        for name, weight in straight.items():
            assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize("case", [replace(CASE, stage=1), CASE, partitioned()])
def test_a_checkpoint_is_loaded_over_an_edit(rank_pool, tmp_path, case):
    for alone, edited in rank_pool.run(loaded_over_edit, 2, case, str(tmp_path / "c")):
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
        (STAGES[:2], "on_train_batch_end", "replace_module", 3, ["'net.head'", "another fit"]),
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
        for name, message, done in rank_pool.run(error_of, 2, case, hook, edit):
            assert name == "ParameterEditError", message
            assert done == steps
            for part in named:
                assert part in message


def test_frozen_modules_and_wrappers_may_take_a_place():
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity())
    tree = ModuleTree(root)
    root[0] = nn.Sequential(root[0])
    root[1] = nn.Linear(2, 2).requires_grad_(False)
    assert tree.replaced() == []
    root[2] = nn.Linear(2, 2)
    (said,) = tree.replaced()
    assert said.startswith("Module '2' was replaced")


def test_a_rank_that_refuses_stops_all(rank_pool):
    # After the backward pass: before, ranks would reduce gradients of different sizes.
    hook = "on_before_optimizer_step"
    results = rank_pool.run(error_of, 2, CASE, hook, "freeze_on_one_rank")
    (first, others, _), (second, own, _) = results
    assert (first, second) == ("ParameterEditError",) * 2
    assert "Another rank" in others
    assert "'net.head.bias'" in own
