"""The commands that the documentation may use, and whether their arguments would be taken."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from lightning_fastmoe import cli
from lightning_fastmoe.cli.table import COMMANDS, PROGRAM, TRAINING
from lightning_fastmoe.demos.byte_lm import cli as lm_cli

ROOT = Path(__file__).parents[2]
SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h"}
OTHERS = {"srun", "hf", "jq", "echo"}
"""Programs of others, in blocks that are not run."""
ENDS = {"|", "&&", "||", ";"}


def of_script(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell script, without variables set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in ENDS:
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def check(words: list[str], monkeypatch: pytest.MonkeyPatch, *, runs: bool) -> None:
    """Fails unless there is such a command and it takes these arguments.

    Args:
        words: the program and its arguments.
        monkeypatch: the test's fixture.
        runs: whether this block runs in the tests, where no third-party program may be needed.
    """
    program, *arguments = words
    if program == PROGRAM:
        check_own(arguments, monkeypatch)
    elif program == "export":
        assert all(re.fullmatch(r"[A-Z_]+=.*", argument) for argument in arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "torchrun":
        # A shell's variables stand for numbers or for names; a number will do for both.
        arguments = [re.sub(r"\$[A-Z_]+", "1", argument) for argument in arguments]
        options = get_args_parser().parse_args(arguments)
        if options.no_python:
            check([options.training_script, *options.training_script_args], monkeypatch, runs=runs)
    elif program.endswith("python"):
        check_python(arguments, monkeypatch)
    else:
        assert program in OTHERS, f"{program} is unknown: add how to check it, or to OTHERS"
        assert not runs, f"{program} would not be run: mark the block"
        if program == "srun":
            check(arguments, monkeypatch, runs=runs)


def check_own(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds a command of the package to its parser."""
    arguments = [a for a in arguments if a != "--print_config"]
    if arguments[0] in TRAINING:
        check_training(arguments, monkeypatch)
    else:
        parser_of(arguments[0]).parse_args(arguments[1:])


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command that is not LightningCLI's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    return parser


class _Parsed(Exception):
    pass


def check_training(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds what is told to LightningCLI to the signatures, and builds nothing."""

    def stop(self: object) -> None:
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [PROGRAM])
        patch.setattr(lm_cli.FastMoECLI, "instantiate_classes", stop)
        with pytest.raises(_Parsed):
            cli.main(words)


def check_make(arguments: list[str]) -> None:
    """Targets and variables of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert targets
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        if is_variable:
            assert re.search(rf"^{name} \?=|\$\({name}\)", makefile, re.MULTILINE), argument
        else:
            assert name in targets[1].split(), argument


def check_pip(arguments: list[str]) -> None:
    """``pip install`` of this package, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] == "install"
    wanted = re.fullmatch(r"\.(?:\[(.+)\])?", arguments[-1])
    assert wanted, arguments
    extras = wanted[1].split(",") if wanted[1] else []
    assert set(extras) <= set(project["optional-dependencies"])


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of the repository, a user's own, or pytest on paths that exist."""
    if arguments[:2] == ["-m", "pytest"]:
        paths = [a for a in arguments[2:] if a.startswith("tests")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
        return
    script, *rest = arguments
    if "/" not in script:
        assert not rest, "a script that the reader writes takes no arguments here"
        return
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: list[str] | None = None, *_: object) -> None:
        self.allow_abbrev = False
        _, unknown = parse(self, args)
        assert not unknown
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *rest])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(_Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def check_mention(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command within a sentence, where arguments may be left out, or be alternatives: `a|b`."""
    program, *arguments = words
    if program == "make":
        check_make(arguments)
    elif arguments[0] in TRAINING:
        if len(arguments) > 1:
            check_training(arguments, monkeypatch)
    elif arguments[0] != "--help":
        for name, *rest in itertools.product(*(argument.split("|") for argument in arguments)):
            try:
                with contextlib.redirect_stderr(io.StringIO()) as printed:
                    parser_of(name).parse_args(rest)
            except (SystemExit, argparse.ArgumentError) as error:
                reason = f"{error} {printed.getvalue()}"
                assert re.search("required|expected (one|at least one) argument", reason), reason
