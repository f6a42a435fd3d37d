"""examples/transformer_xl.py: two processes train, and a second run goes on midway."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from lightning_fastmoe.checkpoint import CheckpointReader

ROOT = Path(__file__).parents[3]
SIZES = ("--seq_len", "16", "--mem_len", "24", "--save_every", "6")


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "transformer_xl.py"), *SIZES, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def validated(folder: Path) -> dict[int, float]:
    """step -> bits per byte, in all runs."""
    logs = sorted(folder.glob("runs/transformer_xl/version_*/metrics.csv"))
    rows = [row for log in logs for row in csv.DictReader(log.read_text().splitlines())]
    return {int(row["step"]): float(row["val_bpb"]) for row in rows if row.get("val_bpb")}


def test_the_example_trains_and_resumes(tmp_path: Path) -> None:
    lines = [f"{i} and {i} is {2 * i}\n" for i in range(2000)]
    (tmp_path / "text").write_text("".join(lines))
    assert "def " in run(tmp_path, "--path=text", "--max_steps=6")
    last = tmp_path / "runs/transformer_xl/checkpoints/last.ckpt"
    with CheckpointReader(last) as reader:
        assert reader.manifest.topology.world_size == 2
        assert reader.manifest.progress["global_step"] == 6
    run(tmp_path, "--path=text", "--max_steps=12", "--resume")
    with CheckpointReader(last) as reader:
        assert reader.manifest.progress == {"epoch": 0, "global_step": 12}
    found = validated(tmp_path)
    assert list(found) == [5, 11], "the second run took the steps after the first"
    assert found[11] < found[5] < 8
