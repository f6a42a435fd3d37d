"""Saving needs little memory beside the state, whatever its size."""

from __future__ import annotations

import subprocess
import sys

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from lightning_fastmoe.checkpoint import CheckpointReader, OwnedFragment
from lightning_fastmoe.checkpoint.format.shards import write_shard

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

data = torch.ones(100_000_000)
before = peak()
write_shard(Path(sys.argv[1]), [OwnedFragment.of("weights/a", data.shape, 0, data)])
print(data.nbytes, peak() - before)
"""


def test_a_rank_writes_through_a_small_buffer(tmp_path):
    file = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    size, extra = map(int, done.stdout.split()[-2:])
    assert file.stat().st_size > size == 400_000_000
    assert extra < 100_000_000
