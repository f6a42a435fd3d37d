"""FLOPs from active parameters, tokens per second and utilisation, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.model import BATCH, D_FFN, D_MODEL, TOKENS, Model, make_trainer
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_fastmoe import ThroughputMonitor
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.callbacks.throughput import measure_peak_flops

EXPERT = 2 * D_MODEL * D_FFN
DENSE = 4 * D_MODEL + 6 * D_MODEL + 11 * D_MODEL  # routers and readout; the embedding is looked up
ACTIVE = DENSE + 2 * EXPERT + 1 * EXPERT
N = BATCH * TOKENS


class Memory(DummyLogger):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.logged.append(metrics)


class Clock:
    """Stands still between two looks for a tenth of a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.1
        return self.now


def fit(tmp_path, monkeypatch, *callbacks, model=None, **options):
    logger = Memory()
    clock = Clock()
    monkeypatch.setattr("pytorch_lightning.callbacks.throughput_monitor.time.perf_counter", clock)
    trainer = make_trainer(tmp_path, *callbacks, logger=logger, **options)
    trainer.fit(model or Model())
    return {k: v for part in logger.logged for k, v in part.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_items_flops_and_mfu_equal_those_computed_by_hand(tmp_path, monkeypatch, accumulate):
    monitor = ThroughputMonitor(peak_flops=1e6, extra_flops_per_token=100, window_size=4)
    found = fit(tmp_path, monkeypatch, monitor, accumulate_grad_batches=accumulate)
    assert found["train/lengths"] == 8 * N
    assert found["train/samples"] == 8 * BATCH
    assert found["train/device/items_per_sec"] == pytest.approx(N / 0.1)
    flops = 6 * ACTIVE * N + 3 * 100 * N
    assert found["train/device/flops_per_sec"] == pytest.approx(flops / 0.1)
    assert found["train/device/mfu"] == pytest.approx(flops / 0.1 / 1e6)


def test_a_capacity_changes_no_model_flops_but_top_k_does(tmp_path, monkeypatch):
    model = Model(capacity_factor=0.5)
    model.first.top_k = 4
    found = fit(tmp_path, monkeypatch, ThroughputMonitor(window_size=4), model=model)
    want = 6 * (ACTIVE + 2 * EXPERT) * N / 0.1
    assert found["train/device/flops_per_sec"] == pytest.approx(want)
    assert "train/device/mfu" not in found  # no CPU is in Lightning's table


def test_evaluation_has_no_backward(tmp_path, monkeypatch):
    monitor = ThroughputMonitor(window_size=2)
    found = fit(tmp_path, monkeypatch, monitor, limit_val_batches=2)
    assert found["validate/device/flops_per_sec"] == pytest.approx(2 * ACTIVE * N / 0.1)
    assert found["train/device/flops_per_sec"] == pytest.approx(6 * ACTIVE * N / 0.1)


class Knows(Model):
    """Has its own idea of its FLOPs."""

    flops_per_batch = 5000


def test_the_module_is_believed(tmp_path, monkeypatch):
    found = fit(tmp_path, monkeypatch, ThroughputMonitor(window_size=2), model=Knows())
    assert found["train/device/flops_per_sec"] == pytest.approx(50_000)


def test_nothing_is_left_on_the_layers(tmp_path):
    model = Model()
    trainer = make_trainer(tmp_path, ThroughputMonitor(window_size=2), limit_val_batches=1)
    trainer.fit(model)
    assert not model.first._observers
    trainer.validate(model, verbose=False)
    assert not model.first._observers


def test_measured_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning_fastmoe.monitoring.callbacks.throughput.time.perf_counter", Clock()
    )
    size = 1024
    measured = measure_peak_flops(torch.device("cpu"), torch.float32, seconds=0.2)
    assert measured == pytest.approx(2 * size**3 / 0.1)  # a tenth of a second for each product
    monitor = ThroughputMonitor(peak_flops="measured", window_size=4)
    found = fit(tmp_path, monkeypatch, monitor)
    assert monitor.available_flops == pytest.approx(measured, rel=1e-6)
    assert found["train/device/mfu"] == pytest.approx(6 * ACTIVE * N / 0.1 / measured)


@pytest.mark.parametrize(
    "arguments", [{"window_size": 1}, {"peak_flops": "known"}, {"peak_flops": -1.0}]
)
def test_wrong_arguments(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ThroughputMonitor(**arguments)
