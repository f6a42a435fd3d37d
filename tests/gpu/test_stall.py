"""Kernels whose threads are held up at random end, with the same bits; those that stall say so.

Cold starts once held up the three warps that filled no stage of a product: they missed a phase of
the pipeline and waited forever. Delays show in a second what took ten cold starts to see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.ops import _build
from lightning_fastmoe.ops._build.record import Record
from lightning_fastmoe.ops._build.toolchain import compile_library

GUARD = "  if (!kGathers && thread != 0) return;\n"
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)

hopper_only = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0")


def build(folder: Path, *, without: str = "") -> Path:
    """A library with random delays, and without some line of ragged_rows.cuh."""
    sources = folder / "csrc"
    shutil.copytree(_build.SOURCES, sources)
    if without:
        rows = sources / "hopper" / "ragged_rows.cuh"
        text = rows.read_text()
        assert text.count(without) == 1
        rows.write_text(text.replace(without, ""))
    nvcc = _build.find_nvcc()
    cuda = _build.toolkit_version(nvcc)
    # It says that it was built from the package's own sources, or the package would refuse it.
    key = _build.key_for(cuda)
    codes = tuple(_build.codes_to_build(_build.gpus()))
    record = Record(key.sources, cuda, key.machine, codes, torch.__version__)
    units = [path for path in sorted(sources.rglob("*")) if path.suffix in (".cu", ".cpp")]
    library = folder / "kernels.so"
    compile_library(nvcc, record, units, library, ["LIGHTNING_FASTMOE_DELAYS"])
    return library


def run(case: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stall_cases.py")), case],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


@hopper_only
@pytest.mark.timeout(600)
def test_delays_change_nothing_and_the_sort_keeps_its_deadline(tmp_path: Path) -> None:
    plain = run("layers")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("first: ")
    assert plain.stdout.rstrip().endswith("report:")
    library = str(build(tmp_path))
    for seconds in ("1e-6", "2e-5", "5e-4"):  # less than a stage takes, about a round, much more
        delayed = run("layers", LIGHTNING_FASTMOE_LIBRARY=library, LIGHTNING_FASTMOE_DELAY=seconds)
        assert delayed.stdout == plain.stdout, delayed.stdout + delayed.stderr

    late = run(
        "sort",
        LIGHTNING_FASTMOE_LIBRARY=library,
        LIGHTNING_FASTMOE_DELAY="20",
        LIGHTNING_FASTMOE_DEVICE_TIMEOUT="0.5",
    )
    assert "first error: " in late.stdout, late.stdout + late.stderr
    stood_still = "the CUDA kernel of sort_by_expert stood still: after 0.5 seconds, thread 0"
    assert f"sort_by_expert: {stood_still}" in late.stdout.partition("next error: ")[2]
    assert "waited for the other blocks of its grid" in late.stdout
    assert f"lightning_fastmoe: {stood_still}" in late.stderr  # when the process ended


@hopper_only
@pytest.mark.timeout(600)
def test_a_thread_that_waits_for_stages_it_does_not_fill_stalls(tmp_path: Path) -> None:
    """What the guard in produce_rows is for; and the deadline turns the stall into an error."""
    done = run(
        "layers",
        LIGHTNING_FASTMOE_LIBRARY=str(build(tmp_path, without=GUARD)),
        LIGHTNING_FASTMOE_DELAY="2e-5",
        LIGHTNING_FASTMOE_DEVICE_TIMEOUT="2",
    )
    assert "first error: " in done.stdout, done.stdout + done.stderr
    assert "the CUDA kernel of hopper_rows_product stood still: after 2 seconds" in done.stdout
    assert "of its pipeline to be emptied" in done.stdout
