"""The table of commands: what --help lists, how errors read, and that a command starts at once."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

import pytest

from lightning_fastmoe import __version__, cli
from lightning_fastmoe.cli.entry import Parser
from lightning_fastmoe.cli.table import COMMANDS, TRAINING

HEAVY = ("torch", "pytorch_lightning", "deepspeed", "jsonargparse", "numpy")


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*TRAINING, *COMMANDS):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_training_commands_are_those_of_lightning() -> None:
    from lightning_fastmoe.demos.byte_lm.cli import FastMoECLI

    assert list(FastMoECLI.subcommands()) == list(TRAINING)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-fastmoe {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name a command: fit, validate, test, predict, build, env, checkpoint, report"),
        (["bild"], "there is no command 'bild'"),
        (["env", "--yaml"], "unrecognized arguments: --yaml (see lightning-fastmoe env --help)"),
        (["env", "--js"], "unrecognized arguments: --js"),
        (["build", "--arch"], "expected one argument"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(words)
    except SystemExit as stopped:  # argparse's way
        status = stopped.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    module = importlib.import_module(COMMANDS[name].module)
    assert out.startswith(f"usage: lightning-fastmoe {name} ")
    assert module.__doc__.strip() in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_imports_nothing_heavy() -> None:
    """In a process of its own, as the console script would start it."""
    code = f"""
import sys
sys.argv[:] = ["lightning-fastmoe", "env"]
from lightning_fastmoe import cli
from lightning_fastmoe.cli.table import COMMANDS
cli.main(["--help"])
for name in COMMANDS:
    try:
        cli.main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
assert not set(sys.modules) & set({HEAVY!r}), set(sys.modules) & set({HEAVY!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_errors_of_groups_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="program group")
    inner = parser.add_subparsers(required=True, metavar="COMMAND")
    inner.add_parser("one").add_argument("path")
    assert isinstance(inner, argparse.Action)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["one"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: the following arguments are required: path (see program group one --help)\n"
    )
