"""Energy by hand, what is read of the driver, and options that can't be met."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta

import energy_moe
import pytest
import torch
from energy_moe import Scale, markdown, work_of
from layer import machine
from layer.configs import CONFIGS
from layer.errors import BenchmarkError
from layer.floors import Sizes, Work
from layer.power import Meter, Sustained, parse

SCALE = Scale(Sustained(2.0, 600.0, 1500.0), Sustained(0.5, 300.0, 1900.0), idle=100.0)


def test_a_line_of_the_driver():
    sample = parse("2026/11/25 15:28:21.603, 615.24, 1695\n")
    assert sample is not None
    assert (sample.watts, sample.mhz) == (615.24, 1695.0)
    assert sample.at == datetime(2026, 11, 25, 15, 28, 21, 603000)
    for line in ("", "Failed to initialize NVML", "2026/11/25 15:28:21.603, [N/A], 1695"):
        assert parse(line) is None


def test_samples_outside_of_the_time_do_not_count():
    """Of a real process; its first and last lines are from before and after."""
    start = datetime.now() + timedelta(hours=1)
    lines = "".join(
        f"{start + timedelta(seconds=s):%Y/%m/%d %H:%M:%S.%f}, {watts}, {mhz}\n"
        for s, watts, mhz in ((-1, 9, 9), (1, 400, 1000), (2, 600, 1500), (4, 9, 9))
    )
    command = [sys.executable, "-c", f"print({lines!r}, end='')"]
    with Meter(torch.device("cpu"), command) as meter:
        meter.process.wait(60)
    assert meter.between(start, start + timedelta(seconds=3)) == (500.0, 1250.0)
    with pytest.raises(BenchmarkError, match="told no power"):
        meter.between(start + timedelta(seconds=5), start + timedelta(seconds=6))


def test_nothing_is_left_of_a_script_around_the_driver():
    """Its child would hold the pipe open for as long as it lives."""
    script = "sleep 60 & echo '2026/11/25 15:28:21.603, 615.24, 1695'; wait"
    with Meter(torch.device("cpu"), ["sh", "-c", script]) as meter:
        while not meter.samples:
            time.sleep(0.01)
    assert not meter.thread.is_alive()


def test_a_driver_that_is_not_there():
    with (
        pytest.raises(BenchmarkError, match="no-such-program can't be run"),
        Meter(torch.device("cpu"), ["no-such-program"]),
    ):
        pass


def test_joules_by_hand():
    assert SCALE.dense.joules == pytest.approx(1.2)
    assert SCALE.per_flop == pytest.approx(1.2 / (2 * machine.DENSE**3))
    assert SCALE.per_byte == pytest.approx(0.1 / (2 * machine.COPY_BYTES))
    whole = Work(2 * machine.DENSE**3, 2 * machine.COPY_BYTES)
    assert SCALE.of(whole) == pytest.approx(1.2 + 0.1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.name)
def test_the_work_has_all_of_a_step(config):
    assert work_of(Sizes.of(config)).flops == config.step_flops


def test_the_table():
    rows = [
        energy_moe._row("dense", SCALE.dense, None),
        energy_moe._row("a layer", Sustained(1.5, 700.0, 1600.0), 0.7),
    ]
    report = {
        "machine": {"device": "a GPU", "torch": "2"},
        "idle_watts": 100.0,
        "per_flop": SCALE.per_flop,
        "per_byte": SCALE.per_byte,
        "rows": rows,
    }
    text = markdown(report)
    assert "| a layer | 1.500 | 700 | 1600 | 1.050 | 1.50x |" in text
    assert "| dense | 2.000 | 600 | 1500 | 1.200 |  |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu(capsys):
    assert energy_moe.main(["--configs", "switch-8"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--peers", "nobody"), ("--seconds", "-1"), ("--seconds", "nan")], ids=" ".join
)
def test_options_that_can_not_be_met(capsys, wrong):
    assert energy_moe.main(["--configs", "switch-8", *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err
