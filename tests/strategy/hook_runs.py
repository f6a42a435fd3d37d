"""What the ranks run in test_hooks.py: checkpoint hooks that look at weights, or edit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import Case
from strategy.resume_runs import Resumed, error_of, trainer_for
from torch import nn

from lightning_fastmoe import FastMoEStrategy

HEAD, UP = "net.head.weight", "net.moes.0.experts.up_proj"


def add(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["mine"] = torch.ones(2)


def remove(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"][HEAD]


def leave_out(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k: v for k, v in state.items() if "experts" not in k}


def convert(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {k: v.half() for k, v in checkpoint["state_dict"].items()}


def scale(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"][HEAD].mul_(2)


def forget(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]


def on_rank_0(checkpoint: dict[str, Any]) -> None:
    if torch.distributed.get_rank() == 0:
        remove(checkpoint)


def change_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = [{"lr": 0.1}]


EDITS = {
    edit.__name__: edit
    for edit in (add, remove, leave_out, convert, scale, forget, on_rank_0, change_optimizer)
}


class Editing(Resumed):
    """Its hooks call an edit."""

    edit = staticmethod(lambda checkpoint: None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.edit(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.edit(checkpoint)


class EditingCallback(pl.Callback):
    """The same."""

    def __init__(self, edit: Any) -> None:
        self.edit = edit

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.edit(checkpoint)


def edited(case: Case, directory: str) -> dict[str, tuple[str, str]]:
    """The errors of edits while saving, by who edits, and while loading."""
    good = str(Path(directory) / "good.ckpt")
    trainer = trainer_for(case, 1)
    trainer.fit(Resumed(case, "cosine"))
    trainer.save_checkpoint(good)
    found = {}
    module = Editing(case, "cosine")
    trainer = trainer_for(case, 1)
    trainer.fit(module)
    for name, edit in EDITS.items():
        module.edit = edit
        path = str(Path(directory) / f"{name}.ckpt")
        found[f"save {name}"] = error_of(trainer.save_checkpoint, path)
        assert not Path(path).exists()
    for name, edit in EDITS.items():
        module.edit = edit
        found[f"load {name}"] = error_of(trainer_for(case, 2).fit, module, ckpt_path=good)
    module = Resumed(case, "cosine")
    trainer = trainer_for(case, 1, callbacks=[EditingCallback(remove)])
    trainer.fit(module)
    found["callback"] = error_of(trainer.save_checkpoint, str(Path(directory) / "c.ckpt"))
    return found


class Looking(Resumed):
    """Its hooks look at the weights and change nothing; notes what they see."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "cosine")
        self.tied = nn.Linear(self.net["head"].in_features, 1)
        self.tied.weight = self.net["head"].weight
        self.seen: dict[str, dict[str, list[int]]] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 3
        self.seen["saved"] = self._look(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 3
        self.seen["loaded"] = self._look(checkpoint)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _look(self, checkpoint: dict[str, Any]) -> dict[str, list[int]]:
        state = checkpoint["state_dict"]
        if "net.old_head.weight" in state:  # as hooks do that know an older version
            state[HEAD] = state.pop("net.old_head.weight")
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher.")}
        return {name: list(tensor.shape) for name, tensor in state.items()}


def looked(case: Case, directory: str) -> dict[str, dict[str, list[int]]]:
    """What hooks saw, of a save in validation, too."""
    module = Looking(case)
    callback = ModelCheckpoint(directory, save_last=True, save_on_train_epoch_end=False)
    trainer = trainer_for(
        case, 1, callbacks=[callback], enable_checkpointing=True, limit_val_batches=1.0
    )
    trainer.fit(module)
    last = str(Path(directory) / "last.ckpt")
    again = Looking(case)
    trainer_for(case, 2).fit(again, ckpt_path=last)
    return module.seen | again.seen


def without_a_module(case: Case, directory: str) -> list[tuple[str, str]]:
    """Errors of a strategy's own methods before a Trainer has set it up."""
    strategy = FastMoEStrategy()
    early = trainer_for(case, 1)
    early.strategy.connect(Resumed(case, "cosine"))
    return [
        error_of(strategy.load_checkpoint, directory),
        error_of(strategy.save_checkpoint, {}, directory),
        error_of(strategy.lightning_module_state_dict),
        error_of(early.strategy.load_checkpoint, directory),
        error_of(early.strategy.save_checkpoint, {}, directory),
    ]


class Lookalike(Resumed):
    """A dense layer of the user's whose parameters are named as those of MoE."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "cosine")
        experts = nn.ParameterDict({n: torch.ones(2, 3, 3) for n in ("up_proj", "down_proj")})
        self.net["mine"] = nn.ModuleDict({"router": nn.Linear(3, 2), "experts": experts})


def refused_at_set_up(case: Case, directory: str) -> dict[str, tuple[str, str]]:
    """Errors before the first batch of what could not be saved later."""
    folder = Path(directory)
    found = {}

    def fit(name: str, module: Resumed, **options: Any) -> None:
        callback = ModelCheckpoint(directory, **options)
        trainer = trainer_for(case, 1, callbacks=[callback], enable_checkpointing=True)
        found[name] = error_of(trainer.fit, module)
        assert not module.batch_losses

    fit("lookalike", Lookalike(case))
    if torch.distributed.get_rank() == 0:
        for name in ("last.ckpt", "best.ckpt"):
            (folder / name).mkdir()
            (folder / name / "thesis.txt").write_text("years of work")
    torch.distributed.barrier()
    fixed = {"enable_version_counter": False}
    fit("last", Resumed(case, "cosine"), save_last=True, **fixed)
    fit("name", Resumed(case, "cosine"), filename="best", **fixed)
    return found
