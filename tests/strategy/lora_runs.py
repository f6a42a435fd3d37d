"""What the ranks run in test_lora.py: adapters of MoE layers, trained, saved and resumed."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import Case, Net, build_net
from strategy.sparse_experts_runs import Notes
from strategy.tracing import make_trainer
from torch import Tensor, nn

from lightning_fastmoe.errors import FastMoEError
from lightning_fastmoe.nn import add_lora

RANK, ALPHA = 3, 4.5


def adapt(net: Any, alpha: float = ALPHA) -> Any:
    """Gives adapters, of which B isn't zero, so that all gradients matter.

    Only those of experts that this rank holds, by global id, as in a whole model.
    """
    torch.manual_seed(11)
    add_lora(net, RANK, alpha, also_train=["head.weight"])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("_lora_b"):
                layer = net.get_submodule(name.partition(".experts.")[0])
                for row, i in zip(parameter, layer.experts.local_ids, strict=True):
                    generator = torch.Generator().manual_seed(100 * len(row) + i)
                    row.copy_(0.1 * torch.randn(row.shape, generator=generator))
    return net


def adapted(case: Case) -> nn.ModuleDict:
    """The network with its adapters, whole."""
    pl.seed_everything(7, verbose=False)
    net: nn.ModuleDict = adapt(build_net(case.num_experts, case.coefficients))
    return net


class Adapted(Net):
    """Trains adapters."""

    alpha, dispatcher = ALPHA, "auto"

    def configure_model(self) -> None:
        is_new = self.net is None
        super().configure_model()
        if is_new:
            adapt(self.net, self.alpha)
        for layer in self.net["moes"]:
            layer.dispatcher_name = self.dispatcher


def train(
    case: Case,
    load: str | None = None,
    save: str | None = None,
    alpha: float = ALPHA,
    dispatcher: str = "auto",
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Norms and weights of each step."""
    pl.seed_everything(7, verbose=False)
    module, notes = Adapted(case), Notes()
    module.alpha, module.dispatcher = alpha, dispatcher
    if not case.in_configure_model:
        adapt(module.net, alpha)
    trainer = make_trainer(case, callbacks=[notes])
    trainer.fit(module, ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return notes.norms, notes.weights[1:]


def error_of(case: Case, path: str, alpha: float) -> str:
    """The error of resuming with another alpha."""
    try:
        train(case, path, None, alpha)
    except FastMoEError as error:
        return str(error)
    return "none"


def error_of_frozen_adapters(case: Case) -> str:
    """The error of a model whose adapters something has frozen, and trained something else."""
    module = Adapted(case)
    adapt(module.net)
    for name, parameter in module.net.named_parameters():
        parameter.requires_grad_("_lora_" not in name)
    try:
        make_trainer(case).fit(module)
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""
