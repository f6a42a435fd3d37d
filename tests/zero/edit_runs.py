"""What the ranks run in test_weight_edits.py: weights that are written in hooks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import D_IN, Case, Net, RankBatches, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, over_expert_ranks, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


EDITS: dict[str, Callable[[nn.Module, tuple[str, ...]], None]] = {
    f.__name__: f for f in (in_place, one_element, detached, foreach, clamp_data, assign_data, load)
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
        optimizer = make_optimizer(self.net)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)


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


def plain(case: Case, hook: str, edit: str, names: tuple[str, ...]) -> dict[str, Tensor]:
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
    for edit in ((), ("embed.weight", "head.bias")):
        module = Edited(
            case, "on_fit_start", lambda module, names=edit: assign_data(module.net, names)
        )
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
