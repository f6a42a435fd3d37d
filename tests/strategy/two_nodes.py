"""A program as a user would start it with torchrun on each node; writes what rank 0 saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl

sys.path.insert(0, str(Path(__file__).parents[1]))

from strategy.models import Case  # noqa: E402  found by the line above
from strategy.node_runs import ByDedup, Notes  # noqa: E402
from strategy.tracing import Tracer, global_losses, make_trainer  # noqa: E402

STARTED = "a rank has started"


def main(target: str, per_node: int) -> None:
    world = 2 * per_node
    case = Case(world, world, stage=2, nodes=2, in_configure_model=True)
    pl.seed_everything(7, verbose=False)
    module, tracer, notes = ByDedup(case), Tracer(), Notes()
    trainer = make_trainer(case, callbacks=[tracer, notes])
    trainer.fit(module)
    losses = global_losses(module, case, trainer.strategy.root_device)
    if trainer.is_global_zero:
        assert notes.found is not None
        found = {
            "losses": losses,
            "norms": tracer.trace.norms,
            "node": trainer.strategy.num_nodes,
            "schedules": list(notes.found[1]),
        }
        Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    print(STARTED, flush=True)
    main(sys.argv[1], int(sys.argv[2]))
