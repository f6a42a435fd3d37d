"""What the ranks run in test_shared_layer.py: one MoE layer at two depths."""

from __future__ import annotations

import pytorch_lightning as pl
from strategy.models import Case, Net
from strategy.tracing import Tracer, make_trainer
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import moe_layers


class Shared(Net):
    """The first MoE layer is used, and registered, twice."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        layer = self.net["moes"][0]
        self.net["moes"] = nn.ModuleList([layer, layer])


def train(case: Case, load: str | None, save: str | None) -> tuple[list[float], dict[str, Tensor]]:
    """Norms, and weights after the last step; from and to a checkpoint."""
    pl.seed_everything(7, verbose=False)
    module, tracer = Shared(case), Tracer()
    assert len(dict(moe_layers(module))) == 1
    trainer = make_trainer(case, callbacks=[tracer])
    trainer.fit(module, ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return tracer.trace.norms, tracer.trace.weights[-1]


def shares_parameters(case: Case) -> str | None:
    """The error where two layers have one parameter."""
    module = Net(case)
    first, second = module.net["moes"]
    second.experts.down_proj = first.experts.down_proj
    try:
        make_trainer(case).fit(module)
    except ConfigError as error:
        return str(error)
    return None
