"""What the ranks run in test_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import Case, Net
from strategy.tracing import make_trainer

from lightning_fastmoe import MoESummary
from lightning_fastmoe.planning.memory import MemoryPlan
from lightning_fastmoe.planning.sizes import ModelSize

GRADIENTS = {"averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"}
MASTERS = {"single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"}


class Allocated(pl.Callback):
    """The bytes of the storages that DeepSpeed's optimizer and the parameters hold, by purpose."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Buckets are there from the first gradient of a backward pass to its end."""
        last = next(iter(pl_module.net["head"].parameters()))
        last.register_hook(lambda gradient: self._look(trainer, pl_module))
        for parameter in pl_module.parameters():  # which of them is the first is not settled
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: self._look(trainer, pl_module, "buffers"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Any, module: pl.LightningModule, only: str | None = None) -> None:
        if trainer.global_step == 0:
            return
        zero = trainer.strategy.deepspeed_engine.optimizer
        # A gradient on its way lies in a bucket, so buckets are looked at before gradients.
        owned: dict[str, list[Any]] = {"weights": [], "buffers": [], "gradients": []}
        for parameter in module.parameters():
            owned["weights"] += [parameter, getattr(parameter, "ds_tensor", None)]
            owned["gradients"] += [parameter.grad, getattr(parameter, "grad_accum", None)]
        owned["gradients"] += [getattr(zero, name, None) for name in GRADIENTS]
        owned["optimizer"] = [getattr(zero, name, None) for name in MASTERS]
        owned["optimizer"] += list(zero.optimizer.state.values())
        owned["buffers"] = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        seen: set[int] = set()
        for name, values in owned.items():
            sizes = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in _tensors(values)
            }
            count = sum(size for key, size in sizes.items() if key not in seen)
            seen |= set(sizes)
            if only is not None and name != only:
                continue  # gradients on their way would count twice
            self.found[name] = max(self.found.get(name, 0), count)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def allocate(case: Case, optimizer: str) -> tuple[ModelSize, MemoryPlan, dict[str, int]]:
    """What was said before, and what was there then."""
    pl.seed_everything(7, verbose=False)
    kinds = {"AdamW": Net, "SGD": WithMomentum}
    summary, allocated = MoESummary(), Allocated()
    make_trainer(case, callbacks=[summary, allocated]).fit(kinds[optimizer](case))
    assert summary.size is not None
    assert summary.memory is not None
    return summary.size, summary.memory, allocated.found


class WithMomentum(Net):
    """An optimizer with one state in the place of two."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
