"""CapacitySchedule: values by step, between micro-batches, after resuming, and what it refuses."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from callbacks.model import Model, SaveAt, make_trainer

from lightning_fastmoe import CapacitySchedule
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE


class Notes(pl.Callback):
    """What the first layer has in each pass, and how many experts it really chose."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: list[tuple] = []
        self.chosen: list[int] = []

    def on_fit_start(self, trainer, pl_module):
        pl_module.first.register_routing_observer(
            lambda _, routing: self.chosen.append(routing.expert_ids.shape[1])
        )

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(tuple(getattr(pl_module.first, name) for name in self.names))


def test_values_of_each_step(tmp_path):
    schedule = CapacitySchedule(
        capacity_factor={1: 2.0, 3: None}, top_k={0: 3, 2: 1}, layers="first"
    )
    notes = Notes("capacity_factor", "top_k")
    model = Model()
    trainer = make_trainer(tmp_path, schedule, notes, accumulate_grad_batches=2)
    trainer.fit(model)
    steps = [(None, 3), (2.0, 3), (2.0, 1), (None, 1)]
    assert notes.seen == [x for x in steps for _ in range(2)]
    assert notes.chosen == [3, 3, 3, 3, 1, 1, 1, 1]
    assert model.second.top_k == 1
    assert model.second.capacity_factor is None


def test_a_resumed_run_has_the_same_values(tmp_path):
    def make():
        return CapacitySchedule(top_k=lambda step: 1 + step % 3, layers="first"), Notes("top_k")

    schedule, notes = make()
    save = SaveAt(4, tmp_path / "x.ckpt")
    make_trainer(tmp_path, schedule, notes, save, max_steps=4).fit(Model())
    schedule, rest = make()
    make_trainer(tmp_path, schedule, rest).fit(Model(), ckpt_path=tmp_path / "x.ckpt")
    assert [k for (k,) in notes.seen + rest.seen] == [1 + i % 3 for i in range(8)]


def test_linear_interpolates_between_steps_and_rounds_top_k():
    schedule = CapacitySchedule(
        capacity_factor={10: 2.0, 20: 1.0, 30: None}, top_k={0: 8, 8: 2}, interpolation="linear"
    )
    found = [schedule.value("capacity_factor", s) for s in (0, 10, 15, 20, 29, 30, 99)]
    assert found == ["unchanged", 2.0, 1.5, 1.0, 1.0, None, None]
    assert [schedule.value("top_k", s) for s in (0, 3, 4, 7, 8)] == [8, 6, 5, 3, 2]
    step = CapacitySchedule(capacity_factor={10: 2.0, 20: 1.0})
    assert [step.value("capacity_factor", s) for s in (10, 19, 20)] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(("router", "name"), [("noisy", "noise"), ("switch", "jitter")])
def test_noise_is_scheduled_under_each_routers_own_name(tmp_path, router, name):
    model = Model()
    model.first = MoE(8, 16, 4, None, router=router)
    schedule = CapacitySchedule(noise={0: 0.5, 4: 0.0}, interpolation="linear", layers="first")
    values = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            values.append(getattr(pl_module.first.router, name))

    make_trainer(tmp_path, schedule, Look()).fit(model)
    assert values == [0.5, 0.375, 0.25, 0.125, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to change"),
        ({"top_k": {}}, "at least one optimizer step"),
        ({"top_k": {-1: 2}}, "at least one optimizer step"),
        ({"top_k": {0: 2}, "interpolation": "cubic"}, "'cubic'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CapacitySchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": {0: 2}, "layers": "blocks.*"}, "matches no MoE layer"),
        ({"top_k": {0: 2, 10**6: 5}, "layers": "first"}, "top_k=5"),
        ({"capacity_factor": {0: -1.0}}, "capacity_factor=-1.0"),
        ({"noise": {0: 1.0}}, "SoftmaxTopKRouter.*no noise"),
    ],
)
def test_refused_before_the_first_step(tmp_path, arguments, message):
    model = Model()
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, CapacitySchedule(**arguments)).fit(model)
