"""The benchmark of checkpoints, on a state of some megabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"
SYSTEMS = {"fastmoe", "deepspeed", "dcp", "torch"}


def test_every_system_writes_the_state_and_nothing_is_left(tmp_path):
    command = [sys.executable, SCRIPT, "--sizes", "0.05", "--ranks", "2", "--json", "--async"]
    done = subprocess.run(
        [*command, "--directory", tmp_path], capture_output=True, text=True, timeout=200, check=True
    )
    (result,) = map(json.loads, done.stdout.splitlines())
    assert result["size_gib"] == pytest.approx(0.05, rel=0.1)
    systems = result["systems"]
    assert systems.keys() == SYSTEMS
    for name, measured in systems.items():
        # DeepSpeed stores the weights once more.
        size = result["size_gib"] * 2**30 * (4 / 3 if name == "deepspeed" else 1)
        assert measured["files_bytes"] == pytest.approx(size, rel=0.02), name
        assert 0 < measured["save"] <= measured["durable"]
        assert measured["load"] > 0
    assert systems["fastmoe"]["async_stall"] > 0
    assert not list(tmp_path.iterdir())
