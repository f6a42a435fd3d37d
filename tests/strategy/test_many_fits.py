"""Nothing of a Trainer's life stays in the process once its objects are dropped."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from strategy.models import Case, Net
from strategy.reuse_runs import Validating
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.zero import engine


class Everything(Validating):
    """The network with all steps; fails where it is told to."""

    def __init__(self, case: Case, fails_in: str = "") -> None:
        super().__init__(case)
        self.fails_in = fails_in

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fails_in == "training_step" and self.trainer.training:
            super().training_step(batch, batch_idx)
            raise KeyError("training_step")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.fails_in == "configure_optimizers":
            raise KeyError("configure_optimizers")
        return super().configure_optimizers()

    test_step = Validating.validation_step
    predict_step = Validating.validation_step
    test_dataloader = predict_dataloader = Validating.val_dataloader


def use(case: Case, how: str) -> None:
    """One life of a Trainer and a module."""
    fails = how in ("training_step", "configure_optimizers")
    module = Everything(case, how if fails else "")
    # With it, the engine is refused when most of it stands.
    known = () if how == "engine" else engine._KNOWN_OPTIMIZERS
    options: dict[str, Any] = {"limit_val_batches": 0}
    if how == "refused":
        options["gradient_clip_algorithm"] = "value"
    if how in ("validate", "test", "predict"):
        getattr(make_trainer(case), how)(module)
        return
    try:
        with mock.patch.object(engine, "_KNOWN_OPTIMIZERS", known):
            make_trainer(case, **options).fit(module)
    except (KeyError, ConfigError):
        assert how != "fit"
    else:
        assert how == "fit"


def left(case: Case, how: str) -> tuple[list[Any], list[Any], list[Any]]:
    """What stands in the process before the first life, after it, and after three more."""
    counts = []
    torch._dynamo.reset()  # its caches hold the compiled models of the cases before
    for times in (0, 1, 3):
        for _ in range(times):
            use(case, how)
        gc.collect()
        objects = gc.get_objects()
        counts.append(
            [
                len(os.listdir("/proc/self/fd")),
                len(dist.distributed_c10d._world.pg_map),
                sum(isinstance(o, engine.FastMoEEngine) for o in objects),
                sum(isinstance(o, Everything) for o in objects),
                len(parameter_offload.FWD_MODULE_STACK),
                gc.isenabled(),
                _functions(),
            ]
        )
        del objects
        # Gloo's threads end a moment later than their groups.
        counts[-1].append(len(os.listdir("/proc/self/task")))
    return counts[0], counts[1], counts[2]


def _functions() -> int:
    """Changes if a function of torch's is replaced."""
    owners: list[Any] = [torch, torch.Tensor, nn.Module, nn.Linear, nn.functional, dist]
    return hash(
        tuple((n, id(v)) for o in owners for n, v in sorted(vars(o).items()) if callable(v))
    )


def before(case: Case) -> bool:
    """Whether the very first life leaves torch's functions as they were."""
    functions = _functions()
    use(case, "fit")
    return _functions() == functions


def save_after_another(case: Case, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A Trainer saves after a second one has trained another module; (weights, loaded ones)."""
    pl.seed_everything(7, verbose=False)
    module = Everything(case)
    trainer = make_trainer(case, limit_val_batches=0)
    trainer.fit(module)
    assert module.net is not None
    weights = whole_weights(module.net)
    make_trainer(case, limit_val_batches=0).fit(Everything(case))
    path = Path(folder) / "checkpoint"
    trainer.save_checkpoint(path)
    again = Everything(case)
    make_trainer(case).validate(again, ckpt_path=path, verbose=False)
    assert again.net is not None
    return weights, whole_weights(again.net)


def plain_use(case: Case) -> tuple[float, float, list[bool]]:
    """After a fit, the module in plain torch: losses of one batch, before and after a step.

    Also whether each parameter has a gradient then.
    """
    pl.seed_everything(7, verbose=False)
    module = Everything(replace(case))
    make_trainer(case, limit_val_batches=0).fit(module)
    module.trainer = None  # type: ignore[assignment]
    batch = torch.ones(2, 5, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    first = Net.training_step(module, batch, 0)
    first.backward()
    has = [p.grad is not None for p in module.parameters()]
    optimizer.step()
    second = Net.training_step(module, batch, 0)
    return float(first), float(second), has


CASE = Case(world=2, ep=2, steps=1)
LIVES = ("fit", "training_step", "configure_optimizers", "engine", "refused", "validate")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_functions_of_torch_are_put_back(stage: int, rank_pool) -> None:
    assert rank_pool.run(before, 2, replace(CASE, stage=stage)) == [True, True]


@pytest.mark.parametrize("how", [*LIVES, "test", "predict"])
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_stays(stage: int, how: str, rank_pool) -> None:
    """Neither descriptors, threads, groups, engines, modules nor patches."""
    for before_all, first, later in rank_pool.run(left, 2, replace(CASE, stage=stage), how):
        assert first[2:5] == before_all[2:5]
        assert later[2:-1] == first[2:-1]
        # Groups of the cases before may end in between; gloo's threads do so a moment later.
        assert later[:2] <= first[:2]
        assert later[-1] <= first[-1] + 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_first_trainer_can_still_save(stage: int, tmp_path: Path, rank_pool) -> None:
    case = replace(CASE, stage=stage)
    for weights, loaded in rank_pool.run(save_after_another, 2, case, str(tmp_path)):
        assert weights.keys() == loaded.keys()
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), name
