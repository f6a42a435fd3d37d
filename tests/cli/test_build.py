"""``lightning-fastmoe build``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ops.toolkit import Machine, compilations, units

from lightning_fastmoe import cli
from lightning_fastmoe.ops import _build


def test_for_an_image(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has_gpus()
    assert cli.main(["build", "--arch", "8.0;9.0"]) == 0
    out, err = capsys.readouterr()
    library, _, rest = out.partition(": ")
    assert rest.startswith("compiled in ")
    assert rest.endswith(" s (sm_80, sm_90a; CUDA 13.0)\n")
    assert err.count("\n") == 1
    machine.uninstall()
    assert cli.main(["build", "--arch", "9.0"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{library}: exists already (sm_80, sm_90a; CUDA 13.0)\n"
    assert err == ""
    machine.has_gpus((9, 0))
    assert _build.build().library == Path(library)


def test_json_says_whether_it_compiled_and_for_what(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, compiled in ([], True), ([], False), (["--force"], True):
        assert cli.main(["build", "--json", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["compiled"] is compiled
        assert found["architectures"] == ["sm_90a"]
        assert found["cuda"] == "13.0"
        assert Path(found["library"]).is_file()
        assert found["seconds"] >= 0


def test_output_writes_a_library_that_the_environment_can_name(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = machine.folder / "kernels.so"
    assert cli.main(["build", "--output", str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"To use it: LIGHTNING_FASTMOE_LIBRARY={file}"
    assert compilations(machine.calls()) == sorted(units())
    monkeypatch.setenv("LIGHTNING_FASTMOE_LIBRARY", str(file))
    assert _build.build().library == file


def test_without_a_gpu_it_asks_for_architectures(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.has_gpus()
    assert cli.main(["build"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no GPU was found")
    assert "--arch '8.0;9.0a'" in err
    assert err.count("\n") == 1
    assert machine.calls() == []


def test_a_failing_compiler_is_quoted(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install("echo 'unsupported GNU version' >&2; exit 1")
    assert cli.main(["build"]) == 2
    err = capsys.readouterr().err
    assert "error: this failed: " in err
    assert err.endswith("unsupported GNU version\n")


def test_an_output_that_cannot_be_written(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "--output", "/proc/nowhere/kernels.so"]) == 2
    assert "error: /proc/nowhere/kernels.so can't be written" in capsys.readouterr().err
