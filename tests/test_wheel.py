"""``pip install`` compiles nothing: a wheel holds csrc/ as text, and no binary."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_fastmoe import __version__

ROOT = Path(__file__).parents[1]
CSRC = {
    f"lightning_fastmoe/{file.relative_to(ROOT).as_posix()}"
    for file in (ROOT / "csrc").rglob("*")
    if file.is_file()
}


def make_wheel(folder: Path) -> tuple[Path, Path]:
    """The wheel of folder/source, and the log of the compilers that were within reach."""
    log = folder / "log"
    tools = folder / "cuda" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("nvcc", "gcc", "g++", "cc", "c++", "ninja"):
        (tools / name).write_text(f'#!/bin/sh\necho "$0 $*" >> "{log}"\nexit 1\n')
        (tools / name).chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--no-index", "--wheel-dir", str(folder), str(folder / "source")]
    environment = {
        **os.environ,
        "CUDA_HOME": str(tools.parent),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    subprocess.run(command, env=environment, check=True, timeout=280)
    (wheel,) = folder.glob("*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a copy of this checkout, as source."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("lightning_fastmoe", "csrc"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def built(source: Path) -> tuple[Path, Path]:
    """Its wheel, and the log of compilers."""
    return make_wheel(source)


def test_no_compiler_runs_and_any_machine_takes_it(built: tuple[Path, Path]) -> None:
    wheel, log = built
    assert not log.exists(), log.read_text()
    assert wheel.name == f"lightning_fastmoe-{__version__}-py3-none-any.whl"


def test_the_sources_are_in_it_and_no_binary(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        assert set(wheel.namelist()) >= CSRC
        assert any(name.endswith(".cu") for name in CSRC)
        for name in CSRC:
            assert wheel.read(name) == (ROOT / name).read_bytes()
        for name in wheel.namelist():
            wheel.read(name).decode("utf-8")  # text, all of it


def test_the_command_is_in_it(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
        assert "lightning-fastmoe = lightning_fastmoe.cli:main" in wheel.read(name).decode()
        packages = {
            path.parent.relative_to(ROOT) for path in ROOT.glob("lightning_fastmoe/**/*.py")
        }
        missing = {f"{package}/__init__.py" for package in packages} - set(wheel.namelist())
        assert missing == set()


def test_a_library_that_a_packager_adds_is_in_it(source: Path, built: tuple[Path, Path]) -> None:
    built[0].rename(source / "plain")
    try:
        library = source / "source" / "lightning_fastmoe" / "kernels.so"
        library.write_bytes(b"\x7fELF")
        wheel, log = make_wheel(source)
        assert not log.exists()
        with zipfile.ZipFile(wheel) as content:
            assert content.read("lightning_fastmoe/kernels.so") == b"\x7fELF"
    finally:
        library.unlink()
        (source / "plain").rename(built[0])
