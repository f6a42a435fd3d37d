"""The callbacks from a configuration file, as LightningCLI reads them."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from jsonargparse import ArgumentParser

from lightning_fastmoe import CapacitySchedule, ExpertLoadMonitor, MoESummary, ThroughputMonitor


def read(text: str) -> pl.Callback:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    return parser.instantiate(parser.parse_string(text)).callback


def test_a_capacity_schedule_reads_from_yaml():
    schedule = read("""
callback:
  class_path: lightning_fastmoe.CapacitySchedule
  init_args:
    capacity_factor: {0: 2.0, 1000: null}
    top_k: {5: 2}
    interpolation: linear
""")
    assert isinstance(schedule, CapacitySchedule)
    assert schedule.schedules == {"capacity_factor": {0: 2.0, 1000: None}, "top_k": {5: 2}}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (MoESummary, "{}"),
        (ExpertLoadMonitor, "{figures_every_n_steps: 100, folder: x}"),
        (ThroughputMonitor, "{peak_flops: 989.4e+12, window_size: 5}"),
        (ThroughputMonitor, "{peak_flops: measured}"),
    ],
)
def test_every_other_callback_reads_from_yaml(kind, arguments):
    text = f"callback: {{class_path: lightning_fastmoe.{kind.__name__}, init_args: {arguments}}}"
    assert isinstance(read(text), kind)
