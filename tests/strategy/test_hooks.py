"""Checkpoint hooks see names and shapes of all weights; what they edit is refused, never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import D_FFN, D_MODEL, Case
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


CASE = Case(2, 2, 2)

CHANGES = {
    "add": "'mine' in checkpoint['state_dict'] was added",
    "remove": f"'{HEAD}' in checkpoint['state_dict'] was removed",
    "leave_out": "'net.moes.0.experts.",
    "convert": "and ",
    "scale": f"'{HEAD}' in checkpoint['state_dict'] was changed",
    "forget": "checkpoint['state_dict'] was removed",
    "on_rank_0": f"'{HEAD}' in checkpoint['state_dict'] was removed",
    "change_optimizer": "checkpoint['optimizer_states'] was changed",
}


def test_edits_are_refused_on_all_ranks(rank_pool, tmp_path):
    for found in rank_pool.run(edited, 2, CASE, str(tmp_path)):
        assert len(found) == 2 * len(CHANGES) + 1
        for name, change in CHANGES.items():
            for when in ("save", "load"):
                kind, message = found[f"{when} {name}"]
                assert kind == "CheckpointError", (when, name, message)
                assert f"Editing.on_{when}_checkpoint: " in message
                assert change in message
                assert "has no effect under FastMoEStrategy" in message
        assert "EditingCallback.on_save_checkpoint: " in found["callback"][1]


@pytest.mark.parametrize("stage", [1, 3])
def test_what_hooks_see(rank_pool, tmp_path, stage):
    for seen in rank_pool.run(looked, 2, Case(2, 2, stage), str(tmp_path)):
        assert seen["saved"] == seen["loaded"]
        assert seen["saved"][UP] == [4, D_FFN, D_MODEL]
        assert seen["saved"]["tied.weight"] == seen["saved"][HEAD] == [1, D_MODEL]
        assert seen["saved"]["steps_seen"] == []


def test_a_strategy_without_a_module(rank_pool, tmp_path):
    (errors,) = rank_pool.run(without_a_module, 1, Case(), str(tmp_path))
    methods = ["load", "save", "lightning_module_state_dict", "load", "save"]
    for (kind, message), method in zip(errors, methods, strict=True):
        assert kind == "ConfigError", message
        assert f"FastMoEStrategy.{method}" in message
        assert "ckpt_path" in message


def test_what_could_not_be_saved_is_refused_before_training(rank_pool, tmp_path):
    for found in rank_pool.run(refused_at_set_up, 2, CASE, str(tmp_path)):
        kind, message = found["lookalike"]
        assert kind == "ConfigError", message
        assert "'net.mine' is not a MoE layer" in message
        assert "enable_checkpointing=False" in message
        for name, file in (("last", "last.ckpt"), ("name", "best.ckpt")):
            kind, message = found[name]
            assert kind == "CheckpointError", message
            assert f"{file} is a directory that is not a checkpoint" in message
            assert "thesis.txt" in message
    assert (tmp_path / "last.ckpt" / "thesis.txt").read_text() == "years of work"
