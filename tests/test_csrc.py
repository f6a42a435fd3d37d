"""CUDA sources compile for the oldest and the newest architecture that we look at, and link."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops import _build
from lightning_fastmoe.ops._build.record import Record, read_record
from lightning_fastmoe.ops._build.toolchain import link_commands

SOURCES = sorted(_build.SOURCES.rglob("*.c[up]*"))
UNITS = [source for source in SOURCES if source.suffix in (".cu", ".cpp")]
MAX_LINES = 600
RECORD = Record("0123456789abcdef", "13.0", "linux-x86_64", ("sm_80", "sm_90a"), "2.13.0")


Compilations = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """The compilation of each source by its name; a test waits for those that it looks at alone.

    So the time limit of a test holds for one source, however many there are.
    """
    try:
        nvcc = _build.find_nvcc()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("objects")
    (folder / "record.cpp").write_text(RECORD.source())
    flags = [*_build.default_flags("8.0;9.0a"), "-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    # For the oldest as PTX: assembling it takes as long as all the rest.
    flags = [flag.replace("code=sm_80", "code=compute_80") for flag in flags]
    flags += ["--ptxas-options=-v"]

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        command = _build.compile_command(nvcc, flags, source, folder / f"{source.name}.o")
        return subprocess.run(command, capture_output=True, text=True, check=False)

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    yield {s.name: pool.submit(compile_one, s) for s in [*UNITS, folder / "record.cpp"]}
    pool.shutdown(cancel_futures=True)


def test_the_sources_are_where_the_build_looks():
    assert {"schemas.cpp", "routing.cu", "sort.cu"} <= {source.name for source in UNITS}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_files_are_short(source: Path):
    assert len(source.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", [source.name for source in UNITS])
def test_every_source_compiles(name: str, compiling: Compilations):
    done = compiling[name].result()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [s.name for s in UNITS if s.suffix == ".cu"])
def test_kernels_hardly_spill_registers(name: str, compiling: Compilations):
    """A word or two outside of a loop cost nothing; more would show."""
    spills = re.findall(r"(\d+) bytes spill stores", compiling[name].result().stderr)
    assert spills
    assert max(map(int, spills)) <= 8


def _binutil(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is missing beside the linker"
    return path


def test_links_against_torch_and_carries_its_record(compiling: Compilations, tmp_path: Path):
    """With a torch that has no CUDA, too; and packagers strip libraries."""
    compiled = {name: future.result() for name, future in compiling.items()}
    assert [name for name, done in compiled.items() if done.returncode != 0] == []
    objects = [Path(done.args[done.args.index("-o") + 1]) for done in compiled.values()]
    library = tmp_path / "kernels.so"
    for command in link_commands(_build.find_nvcc(), objects, library, tmp_path):
        subprocess.run(command, check=True)
    subprocess.run([_binutil("strip"), "--strip-all", str(library)], check=True)
    assert read_record(library) == RECORD
    shown = subprocess.run(
        [_binutil("readelf"), "--dynamic", "--wide", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", shown.stdout))
    assert {"libtorch_cuda.so", "libtorch_cpu.so", "libc10.so", "libcudart.so.13"} <= needed
    assert "RUNPATH" not in shown.stdout
