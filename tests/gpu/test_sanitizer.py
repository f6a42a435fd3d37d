"""compute-sanitizer finds no bad access, no race and no use of unwritten memory in our kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OURS = ["--kernel-name", "kernel_substring=lightning_fastmoe"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "tool", [["memcheck"], ["racecheck", *OURS], ["synccheck", *OURS]], ids=lambda tool: tool[0]
)
def test_the_kernels_pass_compute_sanitizer(tool: list[str]) -> None:
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not on PATH")
    env = dict(os.environ)
    if tool[0] == "memcheck":
        # Each tensor its own allocation: a cached block would hide an access past a tensor's end.
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(
        [
            *[sanitizer, "--tool", *tool, "--error-exitcode", "9"],
            *[sys.executable, str(Path(__file__).with_name("sanitizer_cases.py"))],
            # Racecheck looks at shared memory, which beside the products the sort alone uses. It
            # ends with an error of its own in cuBLAS and in kernels of Hopper's copy engine.
            *(["--sort-alone"] if tool[0] == "racecheck" else []),
        ],
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
        env=env,
    )
    output = done.stdout + done.stderr
    found = "\n".join(line for line in output.splitlines() if line.startswith("========="))
    assert done.returncode == 0, found[:4000] + output[-1000:]
    assert "all cases ran" in output
    assert "ERROR SUMMARY: 0 errors" in output or "0 hazards displayed" in output, found[:4000]
