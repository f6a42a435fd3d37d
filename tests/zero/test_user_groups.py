"""``optimizer.param_groups`` is what the user wrote: what is set there is what the step uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_close
from strategy.models import Case, Net, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from lightning_fastmoe.zero.param_groups import UserParamGroups

STEPS = 6
Groups = list[dict[str, Any]]


class Counting(torch.optim.AdamW):
    """Keeps a count in its groups, as some optimizers do, and steps the less the longer."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["count"] += 1
            group["lr"] = group["lr"] / group["count"]
        result = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return result


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-3}),
    "tensor rate": (torch.optim.AdamW, {"lr": torch.tensor(1e-2), "eps": 1e-3, "foreach": False}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5}),
    "counting": (Counting, {"lr": 1e-2, "eps": 1e-3}),
}


def make_optimizer(net: nn.Module, kind: str) -> Optimizer:
    """The backbone with its experts, then the head, by name."""
    cls, options = OPTIMIZERS[kind]
    head = [p for name, p in net.named_parameters() if name.startswith("head")]
    rest = [p for name, p in net.named_parameters() if not name.startswith("head")]
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    groups = [{"params": rest, "name": "backbone"}, {"params": head, "name": "head"}]
    return cls(groups, **options)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda _: None,
    "step": lambda o: schedules.StepLR(o, 2, 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.7),
    "lambda": lambda o: schedules.LambdaLR(o, [lambda s: 1 / (1 + s), lambda s: 1 / (2 + s)]),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=STEPS),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=[1e-2, 3e-2], total_steps=STEPS + 1),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.StepLR(o, 2, 0.5)], milestones=[3]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


def rate_by_index(groups: Groups, step: int) -> None:
    """The head stops for a step, the backbone goes on at another rate."""
    if step == 2:
        groups[0]["lr"], groups[1]["lr"] = 0.05, 0.0
    if step == 3:
        groups[1]["lr"] = 0.02


def tensor_rate(groups: Groups, step: int) -> None:
    """The same in place."""
    if step == 2:
        groups[0]["lr"].fill_(0.05)
        groups[1]["lr"] = torch.tensor(0.02)


def other_options(groups: Groups, step: int) -> None:
    """Decay and betas, and a value that only the user reads."""
    if step == 1:
        groups[0].update(weight_decay=0.5, betas=(0.5, 0.9), note="late")
    if step == 4:
        del groups[0]["note"]
        groups[1]["amsgrad"] = False


def momentum(groups: Groups, step: int) -> None:
    """An option of SGD."""
    groups[step % 2].update(momentum=0.1 * step, nesterov=step > 2)


EDITS = {f.__name__: f for f in (rate_by_index, tensor_rate, other_options, momentum)}


def handles(module: pl.LightningModule) -> list[Any]:
    """All ways to reach the optimizer."""
    return [module.trainer.optimizers[0], module.optimizers(), module.kept]


@dataclass
class Seen:
    """What a run showed before each step, and its weights in the end."""

    groups: list[Groups] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def plain_options(groups: Groups) -> Groups:
    """All options, by value."""
    return [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"}
        for g in groups
    ]


class Batches:
    """A rank's batches, from the one on that a checkpoint was taken after."""

    def __init__(self, batches: Tensor) -> None:
        self.batches, self.done = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        while self.done < len(self.batches):
            self.done += 1
            yield self.batches[self.done - 1]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Edited(Net):
    """Its groups are edited before each step, through another handle each time."""

    def __init__(self, case: Case, kind: str, scheduler: str, edit: str) -> None:
        super().__init__(case)
        self.kind, self.scheduler, self.edit = kind, scheduler, EDITS.get(edit)
        self.seen = Seen()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        if self.edit is not None:
            self.edit(handles(self)[step % 3].param_groups, step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("plateau", torch.ones(()))
        shown = [plain_options(o.param_groups) for o in handles(self)]
        assert shown[0] == shown[1] == shown[2]
        self.members = [[id(p) for p in g["params"]] for g in self.kept.param_groups]
        self.seen.groups.append(shown[0])
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Batches:
        return Batches(make_batches(self.case)[:, 0, self.trainer.global_rank])

    def configure_optimizers(self) -> Any:
        self.kept = make_optimizer(self.net, self.kind)
        scheduler = SCHEDULERS[self.scheduler](self.kept)
        if scheduler is None:
            return self.kept
        schedule = {"scheduler": scheduler, "interval": "step", "monitor": "plateau"}
        return {"optimizer": self.kept, "lr_scheduler": schedule}


class Save(pl.Callback):
    """Saves after some step."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    case: Case,
    kind: str,
    scheduler: str,
    edit: str,
    save: tuple[int, str] | None = None,
    resume: str | None = None,
) -> Seen:
    """Trains under FastMoEStrategy."""
    pl.seed_everything(7, verbose=False)
    module = Edited(case, kind, scheduler, edit)
    callbacks = [Save(*save)] if save else []
    trainer = make_trainer(case, callbacks=callbacks, gradient_clip_val=None)
    trainer.fit(module, ckpt_path=resume)
    assert module.members[1:] == [[id(p) for p in module.net["head"].parameters()]]
    module.seen.weights = whole_weights(module.net)
    return module.seen


def twin(case: Case, kind: str, scheduler: str, edit: str) -> Seen:
    """The same in one process, in plain PyTorch."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer = make_optimizer(net, kind)
    schedule = SCHEDULERS[scheduler](optimizer)
    seen = Seen()
    for i, step in enumerate(make_batches(case)):
        if edit in EDITS:
            EDITS[edit](optimizer.param_groups, i)
        optimizer.zero_grad()
        chunks = [b for micro in step for b in micro]
        for chunk in chunks:
            (loss_of(net, chunk) / len(chunks)).backward()
        seen.groups.append(plain_options(optimizer.param_groups))
        optimizer.step()
        if scheduler == "plateau":
            schedule.step(1.0)
        elif schedule is not None:
            schedule.step()
    seen.weights = {n: p.detach() for n, p in net.named_parameters()}
    return seen


class Wrapping(torch.optim.AdamW):
    """Steps through another optimizer."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups)
        self.base = base


def _wrapped(module: Misused) -> None:
    module.kept = Wrapping(make_optimizer(module.net, "sgd"))


def _replaced_step(module: Misused) -> None:
    module.kept.step = lambda closure=None: None  # type: ignore[method-assign]


def _step(module: Misused) -> None:
    module.kept.step()


def _add_group(module: Misused) -> None:
    module.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def _move(module: Misused) -> None:
    groups = module.kept.param_groups
    groups[0]["params"].append(groups[1]["params"].pop())


def _reverse(module: Misused) -> None:
    module.kept.param_groups.reverse()


def _state_dict(module: Misused) -> None:
    module.optimizers().state_dict()


def _load_state_dict(module: Misused) -> None:
    module.kept.load_state_dict({})


MISUSE: dict[str, tuple[str, Callable[[Misused], None]]] = {
    "wrapped": ("configure_optimizers", _wrapped),
    "replaced step": ("configure_optimizers", _replaced_step),
    "step": ("on_train_batch_start", _step),
    "add group": ("on_train_epoch_start", _add_group),
    "move parameter": ("on_train_batch_start", _move),
    "reverse groups": ("on_before_zero_grad", _reverse),
    "state_dict": ("on_train_start", _state_dict),
    "load_state_dict": ("on_train_start", _load_state_dict),
}


class Misused(Edited):
    """Does to its optimizer what can't be done right."""

    def __init__(self, case: Case, misuse: str) -> None:
        super().__init__(case, "adamw", "none", "")
        self.hook, self.action = MISUSE[misuse]

    def configure_optimizers(self) -> Any:
        super().configure_optimizers()
        self._at("configure_optimizers")
        return self.kept

    def _at(self, hook: str) -> None:
        if hook == self.hook:
            self.action(self)

    def on_train_start(self) -> None:
        self._at("on_train_start")

    def on_train_epoch_start(self) -> None:
        self._at("on_train_epoch_start")

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._at("on_train_batch_start")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._at("on_before_zero_grad")


def error_of(case: Case, misuse: str) -> tuple[str, str]:
    """The error that a fit ends with."""
    try:
        make_trainer(case).fit(Misused(case, misuse))
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return "", "no error"


def fit_twice(case: Case) -> tuple[list[Seen], list[str]]:
    """Two fits with one optimizer that the module keeps, and its class before, between, after.

    ZeRO can't go on with its momentum, which is dropped on purpose.
    """
    pl.seed_everything(7, verbose=False)
    module = Reusing(case, "sgd", "step", "")
    classes, seen = [type(module.made).__name__], []
    for _ in range(2):
        module.seen = Seen()
        module.made.state.clear()
        make_trainer(case, gradient_clip_val=None).fit(module)
        seen.append(module.seen)
        classes.append(type(module.made).__name__)
    return seen, classes


class Reusing(Edited):
    """Makes its optimizer once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made = make_optimizer(self.net, self.kind)

    def configure_optimizers(self) -> Any:
        self.kept = self.made
        return [self.made], [
            {"scheduler": SCHEDULERS[self.scheduler](self.made), "interval": "step"}
        ]


CASE = Case(world=2, ep=2, steps=STEPS, coefficients=(0.0, 0.0))
ALONE = replace(CASE, world=1, ep=1)


def check(trained: Seen, plain: Seen) -> None:
    assert trained.groups == plain.groups
    assert trained.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert_close(trained.weights[name], weight, name)


@pytest.mark.parametrize(
    ("kind", "scheduler", "edit"),
    [
        ("adamw", "none", "rate_by_index"),
        ("adamw", "none", "other_options"),
        ("tensor rate", "none", "tensor_rate"),
        ("tensor rate", "exponential", "tensor_rate"),
        ("sgd", "none", "momentum"),
        ("sgd", "cosine", "momentum"),
        ("counting", "none", "rate_by_index"),
        *(("adamw", s, "rate_by_index") for s in SCHEDULERS if s != "none"),
    ],
)
def test_what_is_set_in_a_group_is_what_its_parameters_train_with(rank_pool, kind, scheduler, edit):
    plain = twin(CASE, kind, scheduler, edit)
    assert len({str(groups) for groups in plain.groups}) > 1, "the edit must do something"
    for trained in rank_pool.run(fit, 2, CASE, kind, scheduler, edit):
        check(trained, plain)


@pytest.mark.parametrize("scheduler", ["none", "step", "plateau"])
@pytest.mark.parametrize("case", [replace(CASE, stage=1), replace(CASE, stage=3), ALONE])
def test_at_every_stage_and_on_one_rank(rank_pool, case, scheduler):
    plain = twin(case, "adamw", scheduler, "rate_by_index")
    for trained in rank_pool.run(fit, case.world, case, "adamw", scheduler, "rate_by_index"):
        check(trained, plain)


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("adamw", "step"), ("tensor rate", "exponential"), ("counting", "none")]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_has_the_values_that_were_set(rank_pool, tmp_path, stage, kind, scheduler):
    case = replace(CASE, stage=stage)
    edit = "tensor_rate" if kind == "tensor rate" else "rate_by_index"
    path = str(tmp_path / "c.ckpt")
    whole = rank_pool.run(fit, 2, case, kind, scheduler, edit, (4, path))[0]
    rest = rank_pool.run(fit, 2, case, kind, scheduler, edit, None, path)[0]
    assert rest.groups == whole.groups[4:]
    for name, weight in whole.weights.items():
        assert torch.equal(rest.weights[name], weight), name


@pytest.mark.parametrize(
    ("misuse", "error", "named"),
    [
        ("wrapped", "ConfigError", ["Wrapping", "'base'"]),
        ("replaced step", "ConfigError", ["AdamW", "subclass"]),
        ("step", "ConfigError", ["self.optimizers().step()"]),
        ("add group", "ParameterGroupError", ["add_param_group()", "configure_optimizers()"]),
        ("move parameter", "ParameterGroupError", ["param_groups has changed", "lr=0"]),
        ("reverse groups", "ParameterGroupError", ["param_groups has changed"]),
        ("state_dict", "ConfigError", ["save_checkpoint()"]),
        ("load_state_dict", "ConfigError", ["ckpt_path"]),
    ],
)
def test_what_would_be_lost_raises(rank_pool, misuse, error, named):
    for name, message in rank_pool.run(error_of, 2, CASE, misuse):
        assert name == error, message
        for part in named:
            assert part in message


def test_every_misuse_is_tested():
    marks = test_what_would_be_lost_raises.pytestmark
    assert {misuse for misuse, *_ in marks[0].args[1]} == MISUSE.keys()


def test_an_optimizer_that_the_module_keeps_serves_two_fits(rank_pool):
    [((first, second), classes)] = rank_pool.run(fit_twice, 1, ALONE)
    assert classes == ["SGD"] * 3
    plain = twin(ALONE, "sgd", "step", "")
    rates = [[group["lr"] for group in step] for step in plain.groups]
    assert [[group["lr"] for group in step] for step in first.groups] == rates
    # The second goes on from where the first one's scheduler left the rate, as in plain PyTorch.
    start = rates[-1][0] / 2
    assert [step[0]["lr"] for step in second.groups] == [start / 2 ** (i // 2) for i in range(6)]


def test_values_also_reach_the_optimizer_of_partitions_that_stay_on_the_gpu():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, twin, backup = (torch.optim.AdamW([weight], lr=1.0) for _ in range(3))
    groups = UserParamGroups(optimizer, {id(weight): "w"}, twin, [0])

    class Zero:
        backup_optimizer = backup

        def zero_grad(self, set_to_none: bool = True) -> None: ...

    groups.attach(Zero())
    optimizer.param_groups[0].update(lr=0.5, betas=(0.1, 0.2))
    groups.push()
    for stepper in (twin, backup):
        assert stepper.param_groups[0]["lr"] == 0.5
        assert stepper.param_groups[0]["betas"] == (0.1, 0.2)


def test_a_value_that_the_saving_run_trained_with_wins_over_one_that_was_only_shown():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    names = {id(w): f"w{i}" for i, w in enumerate(weights)}
    optimizer = torch.optim.SGD(weights, lr=1.0)
    twin = torch.optim.SGD([{"params": [w]} for w in weights], lr=0.25)  # restored before
    groups = UserParamGroups(optimizer, names, twin, [0, 0])
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    groups.load_named([{"params": ["w0", "w1"], "options": options}], "c.ckpt")
    assert optimizer.param_groups[0]["lr"] == 0.25
    groups.push()
    assert [group["lr"] for group in twin.param_groups] == [0.25, 0.25]
