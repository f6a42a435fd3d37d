"""Energy by hand, what is read of the driver, and options that can't be met."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta

import energy_moe
import pytest
import torch
from energy_moe import Scale, markdown, work_of
from layer import machine, power, registry
from layer.configs import CONFIGS
from layer.errors import BenchmarkError
from layer.floors import Sizes, Work
from layer.machine import Yardsticks
from layer.peers import PlainTorch
from layer.power import Meter, Sustained, parse

CPU = torch.device("cpu")
LARGE = Yardsticks(lambda: None, lambda: None, flops=4_000_000, bytes=50_000)
SCALE = Scale(LARGE, Sustained(2.0, 600.0, 1500.0), Sustained(0.5, 300.0, 1900.0), idle=100.0)


def test_a_line_of_the_driver():
    sample = parse("2026/11/25 15:28:21.603, 615.24, 1695\n")
    assert sample is not None
    assert (sample.watts, sample.mhz) == (615.24, 1695.0)
    assert sample.at == datetime(2026, 11, 25, 15, 28, 21, 603000)
    for line in ("", "Failed to initialize NVML", "2026/11/25 15:28:21.603, [N/A], 1695"):
        assert parse(line) is None


def test_samples_outside_of_the_time_do_not_count():
    """Samples come from a real process; its first and last lines are from before and after."""
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
    assert SCALE.per_flop == pytest.approx(1.2 / 4_000_000)
    assert SCALE.per_byte == pytest.approx(0.1 / 50_000)
    assert SCALE.of(Work(4_000_000, 100_000)) == pytest.approx(1.2 + 0.2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.name)
def test_the_work_has_all_of_a_step(config):
    assert work_of(Sizes.of(config)).flops == config.step_flops


def test_the_table_shows_energy_and_its_ratio_to_the_estimate():
    rows = [
        energy_moe.row_of("dense", SCALE.dense),
        energy_moe.row_of("a layer", Sustained(1.5, 700.0, 1600.0), 0.7),
        {"name": "another", "status": "refused", "reason": "wrong"},
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
    assert "| another | refused: wrong | | | | |" in text


class Ran:
    """In place of the driver and the clock: an operation runs once and takes 2 ms at 500 W."""

    def __init__(self, monkeypatch):
        self.operations = 0
        monkeypatch.setattr(power, "sustained", self.sustained)
        monkeypatch.setattr(power, "idle_watts", lambda device, seconds: 100.0)

    def sustained(self, run, device, seconds):
        run()
        self.operations += 1
        return Sustained(2.0, 500.0, 1000.0)


def test_a_run_measures_each_peer_on_each_config(monkeypatch):
    ran = Ran(monkeypatch)
    configs = [CONFIGS["switch-8"].tiny(), CONFIGS["sonic-7b"].tiny()]
    report = energy_moe.run(configs, "uniform", ["ours", "torch"], CPU, 1.0)
    assert ran.operations == 2 + 2 * 2
    large = machine.yardsticks(CPU)
    assert report["per_flop"] == pytest.approx(1.0 / large.flops)
    assert report["per_byte"] == pytest.approx(0.8 / large.bytes)
    assert [row["status"] for row in report["rows"]] == ["ok"] * 6
    for row, config in zip(report["rows"][2:], [*configs[:1] * 2, *configs[1:] * 2], strict=True):
        work = work_of(Sizes.of(config))
        right = work.flops / large.flops + 0.8 * work.bytes / large.bytes
        assert row["joules"] == pytest.approx(1.0)
        assert row["estimate_j"] == pytest.approx(right, rel=0.05)  # if all experts have tokens
        assert config.name in row["name"]
    assert "switch-8, uniform, plain torch | 2.000 | 500 | 1000 | 1.000 |" in markdown(report)


def test_a_peer_that_is_wrong_is_not_measured(monkeypatch):
    class Zeros(PlainTorch):
        name, title = "zeros", "zeros"

        def build(self, problem):
            layer = super().build(problem)
            forward = layer.forward
            layer.forward = lambda: forward() * 0
            return layer

    monkeypatch.setitem(registry.PEERS, "zeros", Zeros)
    ran = Ran(monkeypatch)
    report = energy_moe.run([CONFIGS["switch-8"].tiny()], "uniform", ["zeros"], CPU, 1.0)
    assert ran.operations == 2
    assert report["rows"][-1]["status"] == "refused"


def test_a_peer_that_is_not_here(monkeypatch):
    Ran(monkeypatch)
    with pytest.raises(BenchmarkError, match="SonicMoE"):
        energy_moe.run([CONFIGS["sonic-7b"].tiny()], "uniform", ["sonicmoe"], CPU, 1.0)


def test_every_run_is_counted(monkeypatch):
    """Counting one less or one more than there are makes each longer or shorter than it was."""

    class Event:
        def record(self):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    done, took = power.keep_busy(lambda: calls.append(time.sleep(1e-3)), 3, 0.02)
    assert done == len(calls) >= 3
    assert took >= 1e-3 * done


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
