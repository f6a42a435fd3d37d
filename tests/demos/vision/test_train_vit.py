"""examples/train_vit.py from the command line, on two processes."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.demos.vision import ImageClassifier, ImageData

ROOT = Path(__file__).parents[3]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_vit.py"), *arguments],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def logged(folder: Path, version: int) -> list[tuple[int, int, float]]:
    """(epoch, step, accuracy) of each validation."""
    file = folder / "runs" / "train_vit" / f"version_{version}" / "metrics.csv"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return [
        (int(row["epoch"]), int(row["step"]), float(row["val_accuracy"]))
        for row in rows
        if row.get("val_accuracy")
    ]


def test_it_learns_digits_and_goes_on(tmp_path: Path) -> None:
    """An epoch of 22 steps, then one more."""
    first = run(tmp_path, "--max_epochs", "1")
    assert first.returncode == 0, first.stderr[-3000:]
    before = logged(tmp_path, 0)
    assert [row[:2] for row in before] == [(0, 21)]
    second = run(tmp_path, "--max_epochs", "2", "--resume")
    assert second.returncode == 0, second.stderr[-3000:]
    after = logged(tmp_path, 1)
    assert [row[:2] for row in after] == [(1, 43)]
    assert after[-1][2] > 0.6  # 0.1 by chance
    assert after[-1][2] > before[0][2]
    said = re.search(r"Accuracy on (\d+) images .*: ([\d.]+)%", second.stdout)
    assert said is not None, second.stdout
    assert abs(float(said[2]) / 100 - after[-1][2]) < 1e-3
    # One process, which has all experts and sees each validation image once, finds the same.
    images, classes = ImageData().val.tensors
    assert int(said[1]) == len(images)
    checkpoint = tmp_path / "runs" / "train_vit" / "checkpoints" / "last.ckpt"
    model = ImageClassifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    with torch.no_grad():
        right = int((model.predict_step((images, classes), 0) == classes).sum())
    assert right == pytest.approx(after[-1][2] * len(images), abs=1e-3)
