"""Building the kernels, with a compiler that only pretends."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.ops import _build, native

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi
echo run >> "{log}"
{action}
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo library > "$2"; fi; shift; done
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU of compute capability 9.0, a toolkit and an empty cache."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "LIGHTNING_FASTMOE_KERNELS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIGHTNING_FASTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    install(tmp_path)
    return tmp_path


def install(machine: Path, action: str = "") -> None:
    nvcc = machine / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(COMPILER.format(log=machine / "log", action=action))
    nvcc.chmod(0o755)


def runs(machine: Path) -> int:
    log = machine / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_builds_once_and_finds_it_again(machine: Path, capfd: pytest.CaptureFixture[str]):
    first = _build.build()
    assert first.reason == ""
    assert first.library is not None
    assert first.library.read_text() == "library\n"
    assert capfd.readouterr().err.count("\n") == 1
    units = [s for s in _build.SOURCES.iterdir() if s.suffix in (".cu", ".cpp")]
    assert runs(machine) == len(units) + 1
    assert _build.build() == first
    assert runs(machine) == len(units) + 1
    assert capfd.readouterr().err == ""
    assert sorted(p.name for p in first.library.parent.iterdir()) == ["kernels.so", "lock"]


def test_ranks_that_start_together_build_once(machine: Path):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: _build.build(), range(4)))
    alone = runs(machine)
    assert len(set(outcomes)) == 1
    assert outcomes[0].library is not None
    (machine / "log").unlink()
    outcomes[0].library.unlink()
    _build.build()
    assert runs(machine) == alone


def test_other_architectures_are_another_library(machine: Path, monkeypatch: pytest.MonkeyPatch):
    here = _build.build().library
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert _build.build().library != here


def test_a_failed_build_says_how_and_is_tried_again(machine: Path):
    install(machine, "echo 'no host compiler' >&2; exit 1")
    outcome = _build.build()
    assert outcome.library is None
    assert "no host compiler" in outcome.reason
    install(machine)
    assert _build.build().library is not None


def test_the_lock_of_a_dead_process_is_no_obstacle(machine: Path):
    library = _build.build().library
    assert library is not None
    library.unlink()
    assert (library.parent / "lock").exists()
    assert _build.build().library == library


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setenv("LIGHTNING_FASTMOE_KERNELS", "0"), "switches them off"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "no CUDA device"),
        (lambda m: m.setattr(torch.version, "cuda", "12.8"), "same major version"),
        (lambda m: m.setenv("TORCH_CUDA_ARCH_LIST", "Hopper"), "'Hopper'"),
        (lambda m: m.setattr(_build, "SOURCES", Path("nowhere")), "install the package anew"),
        (lambda m: m.setenv("LIGHTNING_FASTMOE_CACHE", os.devnull + "/x"), "Not a directory"),
    ],
)
def test_reasons(machine: Path, monkeypatch: pytest.MonkeyPatch, change, reason: str):
    change(monkeypatch)
    outcome = _build.build()
    assert outcome.library is None
    assert reason in outcome.reason
    assert runs(machine) == 0


def test_architecture_flags():
    assert _build.architecture_flags("8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


def test_one_warning_without_a_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch):
    install(machine, "exit 1")
    native._load.cache_clear()
    native._outcome.cache_clear()
    try:
        with pytest.warns(UserWarning, match="PyTorch's operators"):
            assert native.load() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.load() is None
    finally:
        native._load.cache_clear()
        native._outcome.cache_clear()
