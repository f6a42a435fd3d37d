"""What the ranks run in test_verdicts.py."""

from __future__ import annotations

import pytorch_lightning as pl
from strategy.midway_runs import EPOCHS, Watch, WithDropout
from strategy.models import Case
from strategy.tracing import make_trainer


def save_midway(case: Case, path: str) -> None:
    """Saves with half of a step's batches done."""
    pl.seed_everything(7, verbose=False)
    trainer = make_trainer(case, max_epochs=1, max_steps=-1, callbacks=[Watch({2: path})])
    trainer.fit(WithDropout(case, 0.0))


def verdicts(case: Case, paths: list[str]) -> list[str | None]:
    """What resuming from each fails with; None if it trains on."""
    result: list[str | None] = []
    for path in paths:
        module = WithDropout(case, 0.0)
        trainer = make_trainer(case, max_epochs=EPOCHS, max_steps=1)
        try:
            trainer.fit(module, ckpt_path=path)
        except Exception as error:
            result.append(f"{type(error).__name__}: {error}")
        else:
            assert module.batch_losses
            result.append(None)
    return result
