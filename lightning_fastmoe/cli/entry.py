"""Entry point of the command ``lightning-fastmoe``; runs the subcommands."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_fastmoe.cli.table import COMMANDS, PROGRAM, TRACEBACK_VARIABLE, TRAINING
from lightning_fastmoe.errors import ConfigError, FastMoEError

_USAGE_ERROR = 2
_INTERRUPTED = 130
_ENOUGH = (
    *("-c", "--config", "-h", "--help", "--print_config"),
    *("--trainer.max_", "--trainer.fast_dev_run"),
)
"""Prefixes of ``fit`` arguments that limit the run or replace it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


def help_text() -> str:
    """The list of commands."""
    width = max(map(len, [*COMMANDS, *TRAINING])) + 2
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Expert parallelism for PyTorch Lightning.",
        "",
        "training, with configuration files (LightningCLI):",
        *(f"  {name:{width}}{summary}" for name, summary in TRAINING.items()),
        "",
        "tools:",
        *(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help     Print this and exit.",
        "  --version      Print the version and exit.",
        "",
        f"{PROGRAM} COMMAND --help describes each command.",
    ]
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        args: command-line arguments; the process's own by default.

    Returns:
        The exit status: 0; 2 after an error that the user can fix; 130 after Ctrl-C.
    """
    try:
        return _run(sys.argv[1:] if args is None else list(args), args)
    except FastMoEError as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        return _report(str(error))
    except KeyboardInterrupt:
        # During training Lightning handles it; this is for the seconds before.
        return _INTERRUPTED


def _run(words: list[str], args: Sequence[str] | None) -> int:
    commands = ", ".join([*TRAINING, *COMMANDS])
    if not words:
        raise ConfigError(f"name a command: {commands} ({PROGRAM} --help describes them)")
    first = words[0]
    if first in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0
    if first == "--version":
        from lightning_fastmoe import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    if first in COMMANDS:
        return run_command(first, words[1:])
    if first not in TRAINING and not first.startswith("-"):
        raise ConfigError(f"there is no command {first!r}; the commands are {commands}")
    if first == "fit" and not any(word.startswith(_ENOUGH) for word in words[1:]):
        raise ConfigError(
            "fit needs a configuration that says what to train and for how long:"
            f" {PROGRAM} fit --config examples/tiny_lm.yaml (a file in the repository)"
        )
    if args is None:
        # Importing torch, Lightning and DeepSpeed creates hundreds of thousands of objects that
        # live as long as the process; looking for garbage among them is a fifth of the import.
        # FastMoECLI switches it on again. Only here, as the whole process is the command's.
        gc.disable()
    from lightning_fastmoe.demos.byte_lm.cli import run

    run(args)
    return 0


def run_command(name: str, words: list[str]) -> int:
    """Runs one of :data:`~lightning_fastmoe.cli.table.COMMANDS` and returns its exit status."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(words)))


def _report(message: str) -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    who = "error" if rank == "0" else f"error (rank {rank})"
    sys.stderr.write(f"{who}: {message}\n")  # one write: ranks share the terminal
    return _USAGE_ERROR
