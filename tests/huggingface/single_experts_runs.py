"""What the ranks run in test_single_experts.py: training some experts of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface.sharding_runs import Run, Tuned
from strategy.sparse_experts_runs import Notes, Weights
from strategy.tracing import make_trainer

from lightning_fastmoe import SparseUpdate
from lightning_fastmoe.huggingface import save_pretrained


def train(
    run: Run, experts: dict[str, list[int]], export: Path | None = None
) -> tuple[list[float], list[Weights], int]:
    """Norms, whole weights, and how many elements this rank's optimizer has a first moment of."""
    notes, update = Notes(), SparseUpdate(experts={f"net.{n}": i for n, i in experts.items()})
    trainer: Any = make_trainer(run, callbacks=[update, notes])
    module = Tuned(run)
    trainer.fit(module)
    if export is not None:
        save_pretrained(trainer, export)
    state = trainer.strategy.deepspeed_engine.optimizer.optimizer.state
    return notes.norms, notes.weights, sum(s["exp_avg"].numel() for s in state.values())
