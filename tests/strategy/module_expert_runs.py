"""What the ranks run in test_module_experts.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.expert_modules import Plain, build_modules
from strategy.models import D_FFN, D_MODEL
from strategy.reshard_runs import Layout, WithModules
from strategy.resume_runs import error_of, trainer_for
from strategy.tracing import whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.checkpoint.weights import load_weights


class Keep(pl.Callback):
    """The weights while the model is sharded, and this rank's buffers."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        saved = pl_module.state_dict().keys()
        self.state = {f"net.{n}": w for n, w in whole_weights(pl_module.net).items()}
        self.state |= {n: b.clone() for n, b in pl_module.named_buffers() if n in saved}


def validated(layout: Layout, module: pl.LightningModule, path: str | None) -> dict[str, Tensor]:
    """The state of a model that is validated: weights of all experts, buffers of this rank's."""
    keep = Keep()
    trainer = trainer_for(layout.case(), 1, limit_val_batches=1, callbacks=[keep])
    trainer.validate(module, ckpt_path=path, verbose=False)
    return keep.state


def load(layout: Layout, path: str, strict: bool = True) -> dict[str, Tensor]:
    """From a checkpoint or file."""
    pl.seed_everything(9, verbose=False)
    module = layout.module()
    module.strict_loading = strict
    return validated(layout, module, path)


class FromWeights(WithModules):
    """Fills itself while it is built; each rank has created its own experts alone."""

    path = ""

    def configure_model(self) -> None:
        super().configure_model()
        load_weights(self.path, self)


def start_from(layout: Layout, path: str) -> dict[str, Tensor]:
    """The same by ``load_weights``."""
    pl.seed_everything(9, verbose=False)
    module = FromWeights(layout.case(), layout.experts)
    module.path = path
    return validated(layout, module, None)


class Other(WithModules):
    """A model that differs from the checkpoint's."""

    change = ""

    def build(self) -> nn.ModuleDict:
        if self.change == "more experts":
            return build_modules(self.experts, (8, 8))
        if self.change == "fewer experts":
            return build_modules(self.experts, (4, 4))
        if self.change == "another kind":
            return build_modules("class")
        net = super().build()
        experts = net["moes"][0].experts
        if 3 in experts.local_ids:
            last = experts.get_submodule("3")
            if self.change == "another shape":
                last.up, last.down = nn.Linear(D_MODEL, 99), nn.Linear(99, D_MODEL)
            if self.change == "one more parameter":
                last.more = nn.Parameter(torch.ones(2))
        return net


def loading_another(layout: Layout, path: str, change: str, strict: bool) -> tuple[str, str]:
    """The error of loading into a model that differs."""
    pl.seed_everything(9, verbose=False)
    module = Other(replace(layout.case(), stage=layout.stage), layout.experts)
    module.change, module.net = change, None
    module.strict_loading = strict
    return error_of(validated, layout, module, path)


def resuming(layout: Layout, path: str) -> tuple[str, str]:
    """The error of going on from a file."""
    return error_of(trainer_for(layout.case(), 6).fit, layout.module(), ckpt_path=path)


def training(layout: Layout) -> tuple[str, str]:
    """The error of training at all."""
    return error_of(trainer_for(layout.case(), 2).fit, layout.module())


class WithExtraState(Plain):
    """Keeps something that is neither parameter nor buffer."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class WithLayer(Plain):
    """Has experts of its own inside."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__(d_model, d_ffn)
        self.inner = MoE(d_model, d_ffn, 2, dispatcher="local")


def sharing(num_experts: int) -> list[nn.Module]:
    """Experts that share a matrix."""
    modules = [Plain(D_MODEL, D_FFN) for _ in range(num_experts)]
    for module in modules[1:]:
        module.up.weight = modules[0].up.weight
    return modules


class Odd(WithModules):
    """Has experts that can't be saved from several ranks."""

    def build(self) -> nn.ModuleDict:
        net = super().build()
        kinds: dict[str, Any] = {"extra": WithExtraState, "inner": WithLayer, "shared": sharing(4)}
        net["moes"][0] = MoE(D_MODEL, D_FFN, 4, expert=kinds[self.experts])
        return net


def refusals(layout: Layout, directory: str) -> list[tuple[str, str]]:
    """What is said at set-up, and of saving by hand."""
    said = []
    for enabled in (True, False):
        pl.seed_everything(7, verbose=False)
        module = Odd(layout.case(), layout.experts)
        trainer = trainer_for(
            layout.case(), 1, enable_checkpointing=enabled, default_root_dir=directory
        )
        error = error_of(trainer.fit, module)
        if not error[1]:
            error = error_of(trainer.save_checkpoint, f"{directory}/by_hand.ckpt")
        said.append(error)
    return said
