"""examples/plain_torch.py: the same losses on any number of ranks, also after resuming."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "plain_torch.py")


def run(folder: Path, world: int, *arguments: str) -> list[tuple[float, float]]:
    """(loss, norm) of each step; as plain ``python`` where world is 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *(torchrun if world else []), SCRIPT, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # bf16 rounds too coarsely to compare
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step \d+  loss (\S+)  norm (\S+)$", done.stdout, re.MULTILINE)
    return [(float(loss), float(norm)) for loss, norm in found]


def test_two_ranks_train_to_the_losses_of_one_process_which_resumes_them(tmp_path: Path) -> None:
    right = run(tmp_path, 0, "--max-steps", "5", "--save", "one.pt")
    assert right[-1][0] < right[0][0] - 0.5
    found = run(tmp_path, 2, "--max-steps", "3", "--save", "state.pt")
    found += run(tmp_path, 0, "--max-steps", "5", "--save", "state.pt", "--resume")
    for own, twin in zip(found, right, strict=True):
        assert own == pytest.approx(twin, rel=1e-5)
    one, resumed = (torch.load(tmp_path / f, weights_only=True) for f in ("one.pt", "state.pt"))
    assert one["step"] == resumed["step"] == 5
    for name, weight in one["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, rtol=1e-3, atol=1e-5, msg=name)
    assert not (tmp_path / "state.pt.part").exists()
