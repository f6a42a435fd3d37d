"""The plan of a run's memory against what DeepSpeed really allocates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.models import Case, Net, build_net
from strategy.tracing import make_trainer
from torch import nn

from lightning_fastmoe import MoESummary
from lightning_fastmoe.planning.memory import Group, MemoryPlan, optimizer_state_bytes, plan
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


EXPERTS = (32, 64)
WHOLE = sum(p.numel() for p in build_net(EXPERTS, (0.0, 0.0)).parameters())
EXTRA = {"reduce_bucket_size": 5000}


@pytest.mark.parametrize(
    ("world", "ep", "stage", "precision", "optimizer"),
    [
        (1, 1, 1, "bf16-mixed", "SGD"),
        (1, 1, 2, "32-true", "AdamW"),
        (2, 1, 1, "32-true", "AdamW"),
        (2, 2, 1, "bf16-mixed", "AdamW"),
        (2, 1, 2, "bf16-mixed", "AdamW"),
        (4, 2, 2, "32-true", "SGD"),
        (2, 2, 3, "32-true", "AdamW"),
        (4, 2, 3, "bf16-mixed", "SGD"),
    ],
)
def test_plan_is_what_deepspeed_allocates(rank_pool, world, ep, stage, precision, optimizer):
    case = Case(world, ep, stage, 2, num_experts=EXPERTS, precision=precision, steps=2, extra=EXTRA)
    results = rank_pool.run(allocate, world, case, optimizer)
    for size, memory, _ in results:
        assert size.total == WHOLE
        assert memory == results[0][1]
    memory = results[0][1]
    assert memory.state_bytes == {"AdamW": 8.0, "SGD": 4.0}[optimizer]
    for name in ("weights", "gradients", "optimizer", "buffers"):
        real = max(found[name] for _, _, found in results)
        assert getattr(memory.total, name) == pytest.approx(real, rel=0.02), name


def make_plan(group, stage, **config):
    memory = plan([group], stage=stage, itemsize=2, state_bytes=8.0, config=config)
    assert memory.experts.device == 0
    return memory


def test_by_hand():
    """One billion parameters in bf16 with Adam on 64 ranks, as in the ZeRO paper's figure 1."""
    group = Group([10**6] * 1000, 64)
    bucket = {"reduce_bucket_size": 1000}
    one = make_plan(group, 1, **bucket).dense
    assert (one.weights, one.gradients) == (2 * 10**9, 2 * 10**9)
    assert one.optimizer == 12 * 10**9 / 64
    two = make_plan(group, 2, **bucket).dense
    assert two.weights == 2 * 10**9
    assert two.gradients == 2 * 17 * 10**6  # 15.625 million each: 17 reach into some rank's part
    three = make_plan(group, 3, **bucket).dense
    assert three.weights == three.gradients == 2 * 10**9 / 64
    assert three.optimizer == 12 * 10**9 / 64


def test_small_parameters_stay_whole_in_stage_3():
    assert make_plan(Group([100, 1000], 4), 3).dense.weights == 2 * (275 + 1100)
    option = {"stage3_param_persistence_threshold": 500}
    assert make_plan(Group([100, 1000], 4), 3, **option).dense.weights == 2 * (275 + 100)


def test_what_is_offloaded_is_not_on_the_device():
    offload = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    memory = make_plan(Group([1000], 2), 3, **offload)
    assert memory.total.on_host == {"optimizer"}
    assert memory.total.optimizer == 500 * 12
    assert memory.total.device == 2 * 500 + 2 * 1000 + 2 * 500 + 2 * 1000


def test_frozen_parameters_have_weights_alone():
    for stage in (1, 2, 3):
        dense = make_plan(Group([10**6], 2, requires_grad=False), stage).dense
        assert dense.weights == 2 * 10**6 // (2 if stage == 3 else 1)
        assert dense.gradients == dense.optimizer == 0


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda p: torch.optim.Adam(p), 8),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
        (lambda p: Stubborn(p, {}), None),
    ],
)
def test_state_bytes(make, want):
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = make([parameter])
    assert optimizer_state_bytes(optimizer) == want
    assert not optimizer.state
    assert parameter.tolist() == torch.ones(3, 3).tolist()


class Stubborn(torch.optim.Optimizer):
    """Refuses what isn't a matrix."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() == 2
