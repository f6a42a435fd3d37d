"""Every CUDA source compiles for the oldest and the newest architecture that we look at."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_fastmoe.ops import _build

SOURCES = sorted(_build.SOURCES.glob("*.c[up]*"))
UNITS = [source for source in SOURCES if source.suffix in (".cu", ".cpp")]
MAX_LINES = 600


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess]:
    try:
        nvcc = _build.find_nvcc()
    except _build.Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("objects")
    flags = [*_build.default_flags("8.0;9.0a"), "-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    flags += ["--ptxas-options=-v"]

    def compile_one(source: Path) -> tuple[str, subprocess.CompletedProcess]:
        command = _build.compile_command(nvcc, flags, source, folder / f"{source.name}.o")
        return source.name, subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(pool.map(compile_one, UNITS))


def test_the_sources_are_where_the_build_looks():
    assert {"schemas.cpp", "routing.cu", "sort.cu"} <= {source.name for source in UNITS}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_files_are_short(source: Path):
    assert len(source.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", [source.name for source in UNITS])
def test_compiles(name: str, compiled: dict[str, subprocess.CompletedProcess]):
    assert compiled[name].returncode == 0, compiled[name].stderr


@pytest.mark.parametrize("name", [s.name for s in UNITS if s.suffix == ".cu"])
def test_registers_suffice(name: str, compiled: dict[str, subprocess.CompletedProcess]):
    """A word or two outside of a loop cost nothing; more would show."""
    spills = re.findall(r"(\d+) bytes spill stores", compiled[name].stderr)
    assert spills
    assert max(map(int, spills)) <= 8
