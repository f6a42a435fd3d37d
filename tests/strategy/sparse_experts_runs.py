"""What the ranks run in test_sparse_experts.py, and a slow twin with masks on whole stacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from strategy.models import Case, Net, Trace, build_net, loss_of, make_batches, reference
from strategy.tracing import make_trainer, over_expert_ranks
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_fastmoe import SparseUpdate, select_experts
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.errors import FastMoEError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.trained import trained_of

Weights = dict[str, Tensor]
Experts = dict[str, list[int]]


@contextmanager
def masked(net: nn.Module, experts: Experts, dense: bool = True) -> Iterator[Weights]:
    """Trains whole stacks, and undoes what frozen experts get; yields the initial weights."""
    initial = {n: p.detach().clone() for n, p in net.named_parameters()}
    masks: dict[nn.Parameter, Tensor] = {}
    for name, parameter in net.named_parameters():
        layer, is_expert, _ = name.partition(".experts.")
        if not is_expert:
            parameter.requires_grad_(dense)
        elif layer not in experts:
            parameter.requires_grad_(False)
        else:
            mask = torch.zeros(len(parameter), dtype=torch.bool)
            mask[experts[layer]] = True
            masks[parameter] = mask.view(-1, *[1] * (parameter.dim() - 1))
            parameter.register_hook(lambda g, mask=masks[parameter]: g * mask)

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for name, parameter in net.named_parameters():
            if parameter in masks:
                parameter.copy_(torch.where(masks[parameter], parameter, initial[name]))

    hook = register_optimizer_step_post_hook(put_back)
    try:
        yield initial
    finally:
        hook.remove()


def masked_reference(case: Case, experts: Experts, dense: bool) -> tuple[Trace, Weights]:
    """One plain process; the run, and the initial weights."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    with masked(net, experts, dense) as initial:
        return reference(case, net), initial


def whole_stacks(net: nn.Module) -> Weights:
    """Every parameter whole, with trained experts in copies of their stacks."""
    import deepspeed

    own = {}
    for name, parameter in net.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                own[name] = parameter.detach().clone()
        else:
            own[name] = parameter.detach().clone()
    for name, layer in expert_layers(net):
        trained = trained_of(layer.experts.holder)
        for stack in trained.shapes if trained is not None else ():
            values = own.pop(f"{name}.experts.trained.{stack}")
            if trained.rows:
                own[f"{name}.experts.{stack}"][list(trained.rows)] = values
    return over_expert_ranks(net, own)


@torch.no_grad()
def spoil(net: nn.Module) -> None:
    """Overwrites what stacks hold of trained experts, as if no pass had put them there."""
    for _, layer in expert_layers(net):
        trained = trained_of(layer.experts.holder)
        for name in trained.shapes if trained is not None else ():
            stack = layer.experts.holder.get_parameter(name)
            held: Any = stack.data
            if hasattr(stack, "ds_id"):  # without replicas, whose partitions are parts of rows
                held = stack.ds_tensor.data.view(stack.ds_shape)
            held[list(trained.rows)] = torch.nan


class Notes(pl.Callback):
    """Gradient norms, and the whole weights before training and after each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.weights: list[Weights] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_stacks(pl_module.net))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step < len(self.weights):
            return
        self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))
        self.weights.append(whole_stacks(pl_module.net))


class Late(Net):
    """Freezes at the end of configure_model, where each rank has its own experts alone."""

    callback: SparseUpdate

    def configure_model(self) -> None:
        is_new = self.net is None
        super().configure_model()
        if is_new:
            self.callback.apply(self)


def train(
    case: Case, options: dict[str, Any], load: str | None = None, save: str | None = None
) -> tuple[list[float], list[Weights], int]:
    """Norms, weights, and how many elements this rank's optimizer has a first moment of."""
    pl.seed_everything(7, verbose=False)
    notes, update = Notes(), SparseUpdate(**options)
    trainer = make_trainer(case, callbacks=[update, notes])
    module = (Late if case.in_configure_model else Net)(case)
    module.callback = update
    trainer.fit(module, ckpt_path=load)
    if save is not None:
        spoil(module.net)
        trainer.save_checkpoint(save)
    state = trainer.strategy.deepspeed_engine.optimizer.optimizer.state
    return notes.norms, notes.weights, sum(s["exp_avg"].numel() for s in state.values())


def error_of(case: Case, options: dict[str, Any], load: str | None = None) -> str | None:
    """The error of a run."""
    try:
        train(case, options, load)
    except FastMoEError as error:
        return str(error)
    return None


def validates(case: Case, path: str, options: dict[str, Any] | None = None) -> Weights:
    """What a run that validates, perhaps with other experts apart, reads from a checkpoint."""
    pl.seed_everything(8, verbose=False)
    seen: list[Weights] = []

    class Validated(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            seen.append(whole_stacks(self.net))

        val_dataloader = Net.train_dataloader

    module = Validated(case)
    if options is not None:
        SparseUpdate(**options).apply(module)
    make_trainer(case).validate(module, ckpt_path=path, verbose=False)
    return seen[0]


def loads_weights(case: Case, options: dict[str, Any], path: str) -> Weights:
    """The first weights of a run that starts from a checkpoint's, with another selection."""
    update, notes = SparseUpdate(**options), Notes()

    class FromWeights(Net):
        def configure_model(self) -> None:
            if self.net is None:
                super().configure_model()
                update.apply(self)
                load_weights(path, self)

    pl.seed_everything(8, verbose=False)
    make_trainer(case, callbacks=[update, notes]).fit(FromWeights(case))
    return notes.weights[0]


def selects(case: Case, by: Any, **options: Any) -> Experts:
    """What this rank chooses from its own batches while the experts are sharded."""
    pl.seed_everything(7, verbose=False)
    found: list[Experts] = []

    class Selecting(Net):
        def on_validation_start(self) -> None:
            assert self.net is not None
            batches = make_batches(self.case)[:, 0, self.global_rank]
            run = partial(loss_of, self.net)
            found.append(select_experts(self.net, batches, by, run=run, **options))

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            loss_of(self.net, batch)

        val_dataloader = Net.train_dataloader

    make_trainer(case).validate(Selecting(case), verbose=False)
    return found[0]


class SavesMidway(pl.Callback):
    """Saves after the first micro-batch of the second step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1 and trainer.strategy.deepspeed_engine.mid_accumulation:
            trainer.save_checkpoint(self.path)


def trains_midway(case: Case, options: dict[str, Any], path: str, load: bool) -> Weights:
    """The last weights of a run that saves within a step, or goes on from there."""
    pl.seed_everything(7, verbose=False)
    notes = Notes()
    callbacks = [SparseUpdate(**options), notes, *([] if load else [SavesMidway(path)])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resuming within an epoch
        make_trainer(case, callbacks=callbacks).fit(Net(case), ckpt_path=path if load else None)
    return notes.weights[-1]


def trains_twice(
    case: Case, first: dict[str, Any] | None, second: dict[str, Any] | None, release: bool = False
) -> list[Weights]:
    """Weights of the second fit of one module, each fit with its own selection."""
    pl.seed_everything(7, verbose=False)
    module, notes = Net(case), Notes()
    for options, others in ((first, []), (second, [notes])):
        callbacks = [*([] if options is None else [SparseUpdate(**options)]), *others]
        once = replace(case, extra=deepcopy(case.extra))  # a Trainer adds to its config
        make_trainer(once, callbacks=callbacks).fit(module)
        if release:
            SparseUpdate.release(module)
            release = False
    return notes.weights


class Copied(Late):
    """Trains a copy of the network in which it has frozen experts."""

    def configure_model(self) -> None:
        is_new = self.net is None
        super().configure_model()
        if is_new:
            self.net = deepcopy(self.net)


def trains_a_copy(case: Case, options: dict[str, Any], save: str, load: str | None) -> Weights:
    """The last weights of a run, which saves them."""
    pl.seed_everything(7, verbose=False)
    module, notes = Copied(case), Notes()
    module.callback = SparseUpdate(**options)
    trainer = make_trainer(case, callbacks=[module.callback, notes])
    trainer.fit(module, ckpt_path=load)
    trainer.save_checkpoint(save)
    return notes.weights[-1]


def averages_without_callback(case: Case) -> str | None:
    """The error of a run that averages a model in which experts were selected before."""
    module = Net(case)
    SparseUpdate(experts=[1]).apply(module)
    try:
        make_trainer(case, callbacks=[EMAWeightAveraging()]).fit(module)
    except FastMoEError as error:
        return str(error)
    return None


class Namesake(Net):
    """Has a module of its own under the name of trained experts."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        assert self.net is not None
        self.net["experts"] = nn.ModuleDict({"trained": nn.Linear(3, 3)})


def saves_a_namesake(case: Case, path: str) -> list[str]:
    """The errors of fitting with checkpoints, and of saving without."""
    said = []
    try:
        make_trainer(case, enable_checkpointing=True, default_root_dir=path).fit(Namesake(case))
    except FastMoEError as error:
        said.append(str(error))
    trainer = make_trainer(case)
    trainer.fit(Namesake(case))
    try:
        trainer.save_checkpoint(path)
    except FastMoEError as error:
        said.append(str(error))
    return said
