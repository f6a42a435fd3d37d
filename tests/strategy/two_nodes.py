"""A program as a user would start it with torchrun on each node; writes what rank 0 saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl

sys.path.insert(0, str(Path(__file__).parents[1]))

from strategy.models import Case, Net  # noqa: E402  found by the line above
from strategy.tracing import Tracer, global_losses, make_trainer  # noqa: E402


def main(target: str) -> None:
    case = Case(world=2, ep=2, stage=2, nodes=2, in_configure_model=True)
    pl.seed_everything(7, verbose=False)
    module, tracer = Net(case), Tracer()
    trainer = make_trainer(case, callbacks=[tracer])
    trainer.fit(module)
    losses = global_losses(module, case, trainer.strategy.root_device)
    if trainer.is_global_zero:
        found = {"losses": losses, "norms": tracer.trace.norms, "node": trainer.strategy.num_nodes}
        Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
