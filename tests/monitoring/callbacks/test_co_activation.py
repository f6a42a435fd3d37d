"""What CoActivationMonitor leaves in the run's folder."""

from __future__ import annotations

import pytest
import torch
from callbacks.model import Model, SaveAt, make_trainer
from pytorch_lightning.loggers import CSVLogger

from lightning_fastmoe import CoActivationMonitor
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log


def watch(model):
    """Notes the pairs of every pass of training of the first layer."""
    seen = []

    def note(layer, routing):
        if layer.training:
            chosen = torch.zeros(routing.scores.shape, dtype=torch.int64)
            chosen.scatter_(1, routing.expert_ids, 1)
            seen.append(chosen.T @ chosen)

    model.first.register_routing_observer(note)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_file_holds_the_last_steps(tmp_path, accumulate):
    model = Model(steps=8)
    seen = watch(model)
    logger = CSVLogger(tmp_path, name="x")
    options = {"limit_val_batches": 2, "val_check_interval": 2 * accumulate, "logger": logger}
    make_trainer(
        tmp_path, CoActivationMonitor(), accumulate_grad_batches=accumulate, **options
    ).fit(model)
    log = co_activation_log.read(tmp_path / "x" / "version_0" / co_activation_log.FILE_NAME)
    steps = 8 // accumulate
    assert (log.first_step, log.last_step) == (steps - 2, steps - 1)
    assert [x.name for x in log.layers] == ["first", "second"]
    assert log.layers[0].together == sum(seen[-2 * accumulate :]).tolist()
    # One expert per token: no pairs.
    second = torch.tensor(log.layers[1].together)
    assert torch.equal(second, second.diagonal().diag())


def test_a_resumed_run_counts_from_there(tmp_path):
    save = SaveAt(4, tmp_path / "four.ckpt")
    folder = str(tmp_path)
    make_trainer(tmp_path, CoActivationMonitor(folder=folder), save, max_steps=5).fit(Model())
    model = Model()
    seen = watch(model)
    trainer = make_trainer(tmp_path, CoActivationMonitor(3, folder))
    trainer.fit(model, ckpt_path=tmp_path / "four.ckpt")
    log = co_activation_log.read(tmp_path / co_activation_log.FILE_NAME)
    assert (log.first_step, log.last_step) == (4, 5)  # steps 4 and 5: 6 is divided by 3
    assert log.layers[0].together == (seen[0] + seen[1]).tolist()


def test_nothing_is_left_on_the_layers(tmp_path):
    model = Model()
    make_trainer(tmp_path, CoActivationMonitor()).fit(model)
    assert not model.first._observers
    assert not list(tmp_path.glob("*.json"))


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="every_n_steps=0"):
        CoActivationMonitor(0)
