"""Ranks whose settings differ are told which, at once, instead of waiting or training wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, Timer
from strategy.models import Case, Net
from strategy.reuse_runs import Validating
from strategy.tracing import make_trainer

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.callbacks import MoESummary, RouterBiasBalancing

CASE = Case(world=2, ep=2)


def _strategy(**options: Any) -> dict[str, Any]:
    return {"strategy": FastMoEStrategy(**{"expert_parallel_size": 2, **options})}


def _callbacks(*callbacks: pl.Callback) -> dict[str, Any]:
    return {"callbacks": list(callbacks)}


# Name -> options of the Trainer on rank 0, and on rank 1.
DIFFERENT: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "size": (_strategy, lambda: _strategy(expert_parallel_size=1)),
    "auto": (_strategy, lambda: _strategy(expert_parallel_size="auto")),
    "stage": (_strategy, lambda: _strategy(stage=1)),
    "bucket": (_strategy, lambda: _strategy(reduce_bucket_size=500)),
    "nonfinite": (_strategy, lambda: _strategy(nonfinite="ignore")),
    "async": (_strategy, lambda: _strategy(async_checkpoint=True)),
    "exact": (_strategy, lambda: _strategy(exact=True)),
    "precision": (dict, lambda: {"precision": "bf16-mixed"}),
    "accumulation": (dict, lambda: {"accumulate_grad_batches": 2}),
    "clipping": (dict, lambda: {"gradient_clip_val": 1.0}),
    "steps": (dict, lambda: {"max_steps": 4}),
    "logging": (dict, lambda: {"log_every_n_steps": 3}),
    "validation": (dict, lambda: {"val_check_interval": 2}),
    "sampler": (dict, lambda: {"use_distributed_sampler": True}),
    "summary": (dict, lambda: _callbacks(MoESummary())),
    "selection": (lambda: _callbacks(RouterBiasBalancing()), dict),
    "timer": (lambda: _callbacks(Timer(duration={"hours": 1})), dict),
    "stopping": (
        lambda: _callbacks(EarlyStopping("a")),
        lambda: _callbacks(EarlyStopping("b")),
    ),
    "saving": (
        lambda: _callbacks(ModelCheckpoint(every_n_train_steps=2)),
        lambda: _callbacks(ModelCheckpoint(every_n_train_steps=3)),
    ),
    "best": (
        lambda: _callbacks(ModelCheckpoint(save_top_k=2, monitor="x")),
        lambda: _callbacks(ModelCheckpoint(save_top_k=3, monitor="x")),
    ),
}
NAMED = {
    "size": "FastMoEStrategy(expert_parallel_size=) is 2 on rank 0 and 1 on rank 1",
    "auto": "FastMoEStrategy(expert_parallel_size=) is 2 on rank 0 and 'auto' on rank 1",
    "stage": "the DeepSpeed config's zero_optimization.stage is 2 on rank 0 and 1 on rank 1",
    "bucket": "zero_optimization.reduce_bucket_size is 25000000 on rank 0 and 500 on rank 1",
    "nonfinite": "FastMoEStrategy(nonfinite=) is 'raise' on rank 0 and 'ignore' on rank 1",
    "async": "FastMoEStrategy(async_checkpoint=) is False on rank 0 and True on rank 1",
    "exact": "FastMoEStrategy(exact=) is False on rank 0 and True on rank 1",
    "precision": "Trainer(precision=) is '32-true' on rank 0 and 'bf16-mixed' on rank 1",
    "accumulation": "Trainer(accumulate_grad_batches=) is 1 on rank 0 and 2 on rank 1",
    "clipping": "Trainer(gradient_clip_val=) is 0.05 on rank 0 and 1.0 on rank 1",
    "steps": "Trainer(max_steps=) is 3 on rank 0 and 4 on rank 1",
    "logging": "Trainer(log_every_n_steps=) is 50 on rank 0 and 3 on rank 1",
    "validation": "Trainer(val_check_interval=) is 1.0 on rank 0 and 2 on rank 1",
    "sampler": "Trainer(use_distributed_sampler=) is False on rank 0 and True on rank 1",
    "summary": "number 1 of the callbacks that communicate is nothing on rank 0 and MoESummary on",
    "selection": "communicate is RouterBiasBalancing on rank 0 and nothing on rank 1",
    "timer": "communicate is Timer on rank 0 and nothing on rank 1",
    "stopping": "EarlyStopping{'monitor': 'a', 'mode': 'min'} on rank 0 and EarlyStopping{'monit",
    "saving": "'every_n_train_steps': 3",
    "best": "save_top_k=3",
}


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(case: Case) -> dict[str, str]:
    """What a fit raises on this rank for each pair of options."""
    dist.init_process_group("gloo")
    found = {}
    for name, pair in DIFFERENT.items():
        options = {"enable_checkpointing": name in ("saving", "best"), **pair[dist.get_rank()]()}
        found[name] = error_of(lambda: make_trainer(case, **options).fit(Net(case)))  # noqa: B023
    return found


def test_settings_that_differ(rank_pool):
    assert NAMED.keys() == DIFFERENT.keys()
    for found in rank_pool.run(errors, 2, CASE, timeout=120):
        for name, message in found.items():
            assert message.startswith("ConfigError: Ranks have different settings: "), name
            assert NAMED[name] in message, name


def other_version(case: Case) -> str:
    dist.init_process_group("gloo")
    shown = deepspeed.__version__ if dist.get_rank() == 0 else "0.0.1+cu999"
    with mock.patch.object(deepspeed, "__version__", shown):
        return error_of(lambda: make_trainer(case).fit(Net(case)))


def other_call(case: Case) -> str:
    dist.init_process_group("gloo")
    trainer, module = make_trainer(case, limit_val_batches=1), Validating(case)
    return error_of(lambda: (trainer.fit, trainer.validate)[dist.get_rank()](module))


def other_start(case: Case, path: str) -> str:
    """Rank 1 doesn't find the checkpoint, as on a host of its own."""
    dist.init_process_group("gloo")
    saving = make_trainer(case)
    saving.fit(Net(case))
    saving.save_checkpoint(path)
    found = path if dist.get_rank() == 0 else None
    trainer = make_trainer(case, max_steps=4, max_epochs=2)
    message = error_of(lambda: trainer.fit(Net(case), ckpt_path=found))
    trainer.fit(Net(case), ckpt_path=path)  # and what wrapped the Trainer's method is gone
    assert "resume_start" not in vars(trainer._checkpoint_connector)
    assert trainer.global_step == 4
    return message


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (other_version, "the version of deepspeed is "),
        (other_call, "what the Trainer runs is Trainer.fit on rank 0 and Trainer.validate on rank"),
    ],
)
def test_what_runs_differs(rank_pool, run, named):
    for message in rank_pool.run(run, 2, CASE, timeout=60):
        assert message.startswith("ConfigError: Ranks have different settings: ")
        assert named in message


def test_resuming_on_some_ranks(rank_pool, tmp_path):
    for message in rank_pool.run(other_start, 2, CASE, str(tmp_path / "saved"), timeout=60):
        assert "ckpt_path is a checkpoint on rank 0 and None on rank 1" in message


class OwnOptimizer(Net):
    """Each rank configures its optimizer, or the schedule, by itself."""

    def __init__(self, case: Case, what: str) -> None:
        super().__init__(case)
        self.what = what

    def configure_optimizers(self) -> Any:
        other = dist.get_rank() == 1
        named = dict(self.net.named_parameters())
        experts = [p for name, p in named.items() if ".experts." in name]
        dense = [p for name, p in named.items() if ".experts." not in name]
        lr = 2e-2 if other and self.what == "lr" else 1e-2
        expert_lr = 2e-2 if other and self.what.startswith("lr of experts") else 1e-2
        groups: list[dict[str, Any]] = [
            {"params": dense, "lr": lr},
            {"params": experts, "lr": expert_lr},
        ]
        if other and self.what == "a tensor":
            groups[0]["lr"] = torch.tensor(0.5)
        if other and self.what == "groups":
            groups[:1] = [{"params": dense[:2], "lr": lr}, {"params": dense[2:], "lr": lr}]
        kind = torch.optim.Adam if other and self.what == "class" else torch.optim.AdamW
        optimizer = kind(groups, betas=(0.9, 0.99 if other and self.what == "betas" else 0.95))
        rank = dist.get_rank()
        factor = {
            "later": lambda step: 0.5 if rank == 1 and step == 2 else 1.0,
            "rounding": lambda step: 1 + 2e-16 * rank if step else 1.0,
            "half a digit": lambda step: (1.0000000005 - 2e-16 * rank) if step else 1.0,
        }.get(self.what, lambda step: 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        interval = "epoch" if other and self.what == "interval" else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval},
        }


def optimizer_errors(case: Case, whats: list[str]) -> dict[str, tuple[str, int]]:
    """What a fit raises for each difference, and the number of steps that it has taken."""
    dist.init_process_group("gloo")
    found = {}
    for what in whats:
        trainer = make_trainer(case)
        message = error_of(lambda: trainer.fit(OwnOptimizer(case, what)))  # noqa: B023
        found[what] = message, trainer.global_step
    return found


AT_THE_START = {
    "lr": "Option 'lr' of the optimizer's group 0 is 0.01 on rank 0 and 0.02 on rank 1",
    "betas": "Option 'betas' of the optimizer's group 0 is (0.9, 0.95) on rank 0 and (0.9, 0.99)",
    "groups": "The optimizer has 1 group(s) on rank 0 and 2 on rank 1",
    "class": "the optimizer is AdamW on rank 0 and Adam on rank 1",
    "interval": "the scheduler's interval is 'step' on rank 0 and 'epoch' on rank 1",
}


class Dense(OwnOptimizer):
    """Without a MoE layer."""

    def __init__(self, case: Case, what: str) -> None:
        super().__init__(case, what)
        self.net["moes"] = torch.nn.ModuleList()


class WithTensor(OwnOptimizer):
    """The learning rate is a tensor."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        for group in found["optimizer"].param_groups:
            group["lr"] = torch.tensor(group["lr"])
        return found


def later_errors(case: Case) -> list[str]:
    dist.init_process_group("gloo")
    kinds = (Dense, WithTensor)
    return [error_of(lambda: make_trainer(case).fit(kind(case, "later"))) for kind in kinds]  # noqa: B023


def test_schedules_that_come_to_differ(rank_pool):
    """In models without MoE layers, and of learning rates that are tensors."""
    for dense, tensor in rank_pool.run(later_errors, 2, Case(world=2, ep=1), timeout=60):
        for message in (dense, tensor):
            assert message.startswith("ParameterGroupError: Option 'lr' of the optimizer's group 0")


OTHER_LAYERS: dict[str, Callable[[Net], None]] = {
    "top_k of net.moes.1 is 2 on rank 0 and 1 on rank 1": lambda net: setattr(
        net.net["moes"][1], "top_k", 1
    ),
    "capacity_factor of net.moes.0 is None on rank 0 and 1.5 on rank 1": lambda net: setattr(
        net.net["moes"][0], "capacity_factor", 1.5
    ),
    "loss_coefficients of net.moes.0 is {": lambda net: net.net["moes"][0].loss_coefficients.update(
        z_loss=0.5
    ),
}


def layer_errors(case: Case) -> list[str]:
    dist.init_process_group("gloo")
    found = []
    for change in OTHER_LAYERS.values():
        module = Net(case)
        if dist.get_rank() == 1:
            change(module)
        found.append(error_of(lambda: make_trainer(case).fit(module)))  # noqa: B023
    return found


def test_layers_that_differ(rank_pool):
    for found in rank_pool.run(layer_errors, 2, CASE, timeout=60):
        for named, message in zip(OTHER_LAYERS, found, strict=True):
            assert message.startswith("ConfigError: Ranks have different settings: "), message
            assert named in message


def test_optimizers_that_differ(rank_pool):
    whats = [*AT_THE_START, "later", "rounding", "half a digit", "lr of experts"]
    for found in rank_pool.run(optimizer_errors, 2, CASE, whats, timeout=120):
        for what, named in AT_THE_START.items():
            assert named in found[what][0], what
            assert found[what][1] == 0, what
        message, steps = found["later"]
        assert message.startswith(
            "ParameterGroupError: Option 'lr' of the optimizer's group 0 is 0.01 on rank 0 and"
            " 0.005 on rank 1."
        )
        assert steps == 2, "before the third step, which would have been the first to differ"
        for what in ("rounding", "half a digit", "lr of experts"):
            assert found[what] == ("nothing", 3), what


class Adding(OwnOptimizer):
    """Rank 1 adds a group, without the method that refuses it."""

    def on_train_batch_end(self, *args: Any) -> None:
        if dist.get_rank() == 1:
            self.optimizers().optimizer.param_groups.append({"params": [], "lr": 0.1})


def error_of_adding(case: Case) -> str:
    dist.init_process_group("gloo")
    return error_of(lambda: make_trainer(case).fit(Adding(case, "")))


def test_groups_that_one_rank_adds(rank_pool):
    first, second = rank_pool.run(error_of_adding, 2, CASE, timeout=60)
    assert "Another rank has refused edits" in first
    assert "optimizer.param_groups has changed" in second


def test_replicas_of_experts_with_options_of_their_own(rank_pool):
    case = Case(world=2, ep=1)  # then they are trained as dense parameters are
    for found in rank_pool.run(optimizer_errors, 2, case, ["lr of experts"], timeout=60):
        assert "'lr' of the optimizer's group 1 is 0.01" in found["lr of experts"][0]


def harmless(case: Case, directory: str) -> int:
    """What ranks may have of their own: limits, callbacks that work alone, a logger, names."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    keep = ModelCheckpoint(directory, filename=f"{rank}-{{step}}")  # or with the time
    callbacks = [keep, *[LambdaCallback()] * rank]
    options: dict[str, Any] = {"callbacks": callbacks, "logger": not rank}
    options["enable_checkpointing"] = True
    strategy = FastMoEStrategy(2, hang_timeout=100.0 + rank, exchange_timeout=50.0 + rank)
    trainer = make_trainer(case, strategy=strategy, default_root_dir=directory, **options)
    trainer.fit(Net(case))
    assert [path.name for path in Path(directory).glob("*.ckpt")] == ["0-step=3.ckpt"]
    return trainer.global_step


def test_what_ranks_may_have_of_their_own(rank_pool, tmp_path):
    assert rank_pool.run(harmless, 2, CASE, str(tmp_path), timeout=60) == [3, 3]
