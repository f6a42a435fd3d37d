"""``lightning-fastmoe env``: what it says, and that nothing that is missing stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.toolkit import Machine, compilations

from lightning_fastmoe import __version__, cli
from lightning_fastmoe.ops import _build


@pytest.fixture
def env(machine: Machine, capsys: pytest.CaptureFixture[str]):
    """The report as JSON, and its last line as text; it must not have compiled anything."""

    def call() -> tuple[dict[str, Any], str]:
        assert cli.main(["env", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.main(["env"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert compilations(machine.calls()) == []
        return found, out.splitlines()[-1]

    return call


def test_what_is_listed(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-2])
    assert lines["lightning_fastmoe"].startswith(f"{__version__} (")
    assert lines["python"].endswith(f"({sys.executable})")
    assert lines["torch"] == f"{torch.__version__} (CUDA: 13.0)"
    assert lines["GPU"].split(maxsplit=1) == ["1", "GPU number 1 (compute capability 9.0)"]
    assert lines["nvcc"] == f"{machine.nvcc} (13.0)"
    assert lines["architectures"] == "sm_90a"
    assert lines["cache"] == str(machine.cache)
    assert lines["LIGHTNING_FASTMOE_CACHE"] == str(machine.cache)
    assert lines["state"] == "not built"
    for package in ("deepspeed", "pytorch-lightning"):
        assert lines[package][0].isdigit()


def test_not_built_then_built(machine: Machine, env) -> None:
    found, last = env()
    assert found["kernels"]["run"] == "after compiling"
    assert found["kernels"]["library"] is None
    assert last.startswith("The CUDA kernels will run here: the first use compiles them")
    assert not machine.cache.exists()
    library = _build.build().library
    machine.calls()
    found, last = env()
    assert found["kernels"]["run"] is True
    assert found["kernels"]["library"] == str(library)
    assert found["gpus"] == [{"name": f"GPU number {i}", "capability": "9.0"} for i in range(2)]
    assert last == "The CUDA kernels run here."


def test_a_failed_build_is_shown_with_its_reason(
    machine: Machine, env, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.install("echo 'no host compiler'; exit 1")
    _build.build()
    machine.calls()
    found, last = env()
    assert found["kernels"]["run"] is False
    assert found["kernels"]["state"] == "failed"
    assert "no host compiler" in found["kernels"]["reason"]
    assert last.endswith("failed, as shown above. Fix that, then run lightning-fastmoe build.")
    assert cli.main(["env"]) == 0
    assert "\nno host compiler\n" in capsys.readouterr().out


def test_without_nvcc(machine: Machine, env) -> None:
    machine.uninstall()
    found, last = env()
    assert found["nvcc"].startswith("there is no nvcc")
    assert last.startswith("The CUDA kernels don't run here; PyTorch's operators are used instead:")
    assert last.endswith("and put nvcc on PATH, or set CUDA_HOME.")


def test_an_nvcc_that_does_not_run(machine: Machine, env) -> None:
    machine.nvcc.write_text("#!/bin/sh\nexit 3\n")
    assert "this failed" in env()[0]["nvcc"]
    machine.nvcc.chmod(0o644)
    assert "Permission denied" in env()[0]["nvcc"]


@pytest.mark.parametrize(
    ("name", "value", "state", "said"),
    [
        ("LIGHTNING_FASTMOE_KERNELS", "0", "off", "LIGHTNING_FASTMOE_KERNELS=0 switches them off."),
        ("LIGHTNING_FASTMOE_CACHE", os.devnull + "/x", "unavailable", "can't be written"),
        ("LIGHTNING_FASTMOE_LIBRARY", "/nowhere.so", "unavailable", "No such file"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "unavailable", "holds 'Hopper'"),
    ],
)
def test_environment_variables_that_prevent_the_kernels_are_shown(
    env, monkeypatch: pytest.MonkeyPatch, name: str, value: str, state: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    found, last = env()
    assert found["variables"][name] == value
    assert found["kernels"]["state"] == state
    assert found["kernels"]["run"] is False
    assert said in last


def test_without_a_gpu(machine: Machine, env) -> None:
    machine.has_gpus()
    found, last = env()
    assert found["gpus"] == []
    assert "torch sees no CUDA device; if there is one" in last


def test_a_driver_that_fails(env, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    found, last = env()
    assert found["gpus"] == "the driver is too old"
    assert last.endswith("the driver is too old.")


@pytest.mark.parametrize("missing", ["torch", "deepspeed"])
def test_a_broken_installation(missing: str, tmp_path: Path) -> None:
    """In a process of its own: the package would not be imported without them."""
    (tmp_path / f"{missing}.py").write_text("raise ImportError('broken for this test')")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_fastmoe.cli", "env", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"]["run"] is False
    if missing == "torch":
        assert found["torch"] == "broken for this test"
        assert "torch can't be imported: broken" in found["kernels"]["reason"]
