"""Modules and trainers that are used more than once, as users do in notebooks and scripts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from strategy.models import D_MODEL, Case, Net, Trace, make_batches
from strategy.tracing import Tracer, global_losses, make_trainer
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE


class Validating(Net):
    """The network with a validation step on its own training batches."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return self.train_dataloader()


def fit_twice(case: Case, between: str) -> Trace:
    """The second of two fits of one module, each with its own Trainer and optimizer."""
    pl.seed_everything(7, verbose=False)
    module = Validating(case)
    # The model stays a local name: the first engine must not matter even while it is alive.
    first = make_trainer(case, limit_val_batches=0)
    first.fit(module)
    if between == "validate":
        make_trainer(case).validate(module, verbose=False)
    if between == "destroy":
        dist.destroy_process_group()
    module.batch_losses.clear()
    tracer = Tracer()
    second = make_trainer(case, callbacks=[tracer], limit_val_batches=0)
    second.fit(module)
    trace = tracer.trace
    trace.losses = global_losses(module, case, second.strategy.root_device)
    return trace


def fit_in_new_groups(case: Case) -> list[Trace]:
    """Two fits of equal modules, each in process groups of its own."""
    traces = []
    for _ in range(2):
        if dist.is_initialized():
            dist.destroy_process_group()
        pl.seed_everything(7, verbose=False)
        module, tracer = Net(case), Tracer()
        trainer = make_trainer(case, callbacks=[tracer])
        trainer.fit(module)
        tracer.trace.losses = global_losses(module, case, trainer.strategy.root_device)
        traces.append(tracer.trace)
    return traces


def save_after_validating(case: Case, folder: str) -> tuple[float, float]:
    """The validation loss of a module, and of what was saved after validating it."""
    pl.seed_everything(7, verbose=False)
    module = Validating(case)
    trainer = make_trainer(case)
    trainer.validate(module, verbose=False)
    before = sum(module.batch_losses)
    trainer.save_checkpoint(Path(folder) / "checkpoint")
    pl.seed_everything(8, verbose=False)
    other = Validating(case)
    make_trainer(case).validate(other, ckpt_path=Path(folder) / "checkpoint", verbose=False)
    return before, sum(other.batch_losses)


def warnings_of_saving(case: Case, folder: str) -> list[list[str]]:
    """What saving says: after a fit, after an evaluation that follows it, and after one alone."""
    trained, evaluated = Validating(case), Validating(case)
    trainer, other = make_trainer(case), make_trainer(case)
    uses = [
        lambda: (trainer, trainer.fit(trained)),
        lambda: (trainer, trainer.validate(trained, verbose=False)),
        lambda: (other, other.validate(evaluated, verbose=False)),
    ]
    found = []
    for number, use in enumerate(uses):
        saver, _ = use()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            saver.save_checkpoint(Path(folder) / str(number))
        found.append([str(one.message) for one in said if "weights alone" in str(one.message)])
    return found


class Swapped(Net):
    """The same parameters by name, two of them defined in the other order."""

    def __init__(self, case: Case, swap: bool) -> None:
        super().__init__(case)
        assert self.net is not None
        a, b = torch.nn.Linear(D_MODEL, D_MODEL), torch.nn.Linear(D_MODEL, D_MODEL)
        for name, layer in [("b", b), ("a", a)] if swap else [("a", a), ("b", b)]:
            self.net[name] = layer


class SaveAtStart(pl.Callback):
    """Saves what was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def resume_with_another_order(case: Case, folder: str) -> None:
    """Saves one order, as "checkpoint"; loads into the other, and saves that, as "again"."""
    pl.seed_everything(7, verbose=False)
    first = make_trainer(case)
    first.fit(Swapped(case, swap=False))
    path = Path(folder) / "checkpoint"
    first.save_checkpoint(path)
    saver = SaveAtStart(Path(folder) / "again")
    trainer = make_trainer(case, max_epochs=2, max_steps=5, callbacks=[saver])
    trainer.fit(Swapped(case, swap=True), ckpt_path=path)


class WithLocalLayer(Net):
    """Spread layers, and one of 3 experts that stays whole on each of 2 ranks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        assert self.net is not None
        self.net["moes"].append(MoE(D_MODEL, 8, 3, top_k=2, dispatcher="local"))


def local_layer(case: Case) -> tuple[int, list[int], list[float]]:
    """The expert parallel size that "auto" takes, local experts per layer, and the norms."""
    pl.seed_everything(7, verbose=False)
    module, tracer = WithLocalLayer(case), Tracer()
    trainer = make_trainer(case, callbacks=[tracer])
    trainer.fit(module)
    assert module.net is not None
    local = [layer.num_local_experts for layer in module.net["moes"]]
    return trainer.strategy.expert_mesh.ep_size, local, tracer.trace.norms


def one_rank_reference(case: Case) -> list[float]:
    """The norms of the same model, trained in plain PyTorch on the batches of all ranks."""
    from strategy.models import loss_of, make_optimizer, make_scheduler

    from lightning_fastmoe import moe_losses

    pl.seed_everything(7, verbose=False)
    net: Any = WithLocalLayer(case).net
    optimizer = make_optimizer(net)
    scheduler = make_scheduler(optimizer)
    norms = []
    for step in make_batches(case):
        optimizer.zero_grad()
        for chunk in step[0]:
            loss = loss_of(net, chunk)
            ((loss + sum(moe_losses(net).values())) / case.world).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), case.clip)))
        optimizer.step()
        scheduler.step()
    return norms
