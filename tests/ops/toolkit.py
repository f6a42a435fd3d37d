"""A CUDA toolkit that only pretends: its libraries are the concatenated sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.ops import _build

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then
    echo version >> "{log}"
    echo "Cuda compilation tools, release {release}, V{release}.88"
    exit 0
fi
echo "run $*" >> "{log}"
{action}
inputs= output=
while [ $# -gt 0 ]; do
    case "$1" in
        -o) output="$2"; shift ;;
        *.o | *.cu | *.cpp) inputs="$inputs $1" ;;
    esac
    shift
done
cat $inputs > "$output"
"""

VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "LIGHTNING_FASTMOE_KERNELS",
    "LIGHTNING_FASTMOE_LIBRARY",
    "LOCAL_RANK",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
)


class Machine:
    """A machine with GPUs, a toolkit and an empty cache, as this process sees it.

    Args:
        folder: where the toolkit and the cache are.
        setattr: as the built-in, or one that is undone after the test.
    """

    def __init__(self, folder: Path, setattr: Callable[..., None] = setattr) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        self.log = folder / "log"
        self._setattr = setattr

    def has_gpus(self, *capabilities: tuple[int, int], cuda: str | None = "13.0") -> None:
        self._setattr(torch.version, "cuda", cuda)
        self._setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self._setattr(torch.cuda, "init", lambda: None)
        self._setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self._setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        self._setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device}")

    def install(self, action: str = "", release: str = "13.0") -> None:
        self.nvcc.parent.mkdir(parents=True, exist_ok=True)
        text = COMPILER.format(log=self.log, action=action, release=release)
        self.nvcc.write_text(text, encoding="utf-8")
        self.nvcc.chmod(0o755)

    def uninstall(self) -> None:
        self.nvcc.unlink()

    def calls(self, *, forget: bool = True) -> list[str]:
        """What nvcc was called for so far; by default the next call begins with what comes then."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(encoding="utf-8").splitlines()
        if forget:
            self.log.unlink()
        return lines

    def environment(self) -> dict[str, str]:
        return {"LIGHTNING_FASTMOE_CACHE": str(self.cache), "CUDA_HOME": str(self.folder / "cuda")}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs of compute capability 9.0; nvcc is nowhere but in the pretended toolkit."""
    pretended = Machine(tmp_path, monkeypatch.setattr)
    pretended.has_gpus((9, 0), (9, 0))
    pretended.install()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in pretended.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_build.toolchain, "PLACES", ())
    path = [p for p in os.environ["PATH"].split(":") if not (Path(p) / "nvcc").exists()]
    monkeypatch.setenv("PATH", ":".join(path))
    return pretended


def units() -> list[str]:
    """Names of the files that are compiled."""
    return [s.name for s in _build.SOURCES.rglob("*.c*") if s.suffix in (".cu", ".cpp")]


def compilations(calls: Sequence[str]) -> list[str]:
    """Names of the files of csrc/ that these calls compiled, sorted."""
    words = [call.split() for call in calls]
    compiled = [Path(line[line.index("-c") + 1]).name for line in words if "-c" in line]
    return sorted(name for name in compiled if name != "record.cpp")
