"""The phases of a start: their times add up, and a run makes every mark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import start_up

ROOT = Path(__file__).parents[2]
MARKS = [
    ("import", 13.0),
    ("launch", 14.0),
    ("build", 16.0),
    ("set-up", 20.0),
    ("before training", 20.5),
    ("first step", 23.5),
    ("other steps", 24.0),
    ("other steps", 27.5),
    ("end of training", 28.0),
]


def test_phases_add_up() -> None:
    seconds = start_up.durations(10.0, MARKS, 30.0)
    assert list(seconds) == list(start_up.PHASES)
    assert list(seconds.values()) == [3.0, 1.0, 2.0, 4.0, 0.5, 3.0, 4.0, 0.5, 2.0]
    assert start_up.waiting(seconds) == {"command to first step": 13.5, "last step to prompt": 2.5}
    assert "first step          3.00 s" in start_up.table(seconds)


def test_one_step() -> None:
    seconds = start_up.durations(10.0, [m for m in MARKS if m[0] != "other steps"], 30.0)
    assert start_up.waiting(seconds) == {"command to first step": 13.5, "last step to prompt": 6.5}


def test_broken_runs_report_nothing() -> None:
    with pytest.raises(ValueError, match="before its first step"):
        start_up.durations(10.0, MARKS[:4], 30.0)
    with pytest.raises(ValueError, match="'build' ended before"):
        start_up.durations(10.0, [*MARKS, ("build", 13.5)], 30.0)


def test_a_run_makes_every_mark(tmp_path: Path) -> None:
    """With MoESummary, whose own hook before the engine removes itself when it is called."""
    command = [sys.executable, ROOT / "benchmarks/start_up.py", "--json", "--steps", "2"]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    command += [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    command += ["--trainer.callbacks=[{class_path: lightning_fastmoe.MoESummary}]"]
    command += ["--trainer.enable_checkpointing=false", "--data.max_val_windows=1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == list(start_up.PHASES)
