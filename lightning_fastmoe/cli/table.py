"""The commands of ``lightning-fastmoe`` beside those of LightningCLI.

Each is a module with a docstring, which is its help text, and two functions::

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(arguments: argparse.Namespace) -> int: ...  # the exit status

A group of commands calls ``parser.add_subparsers`` in ``add_arguments``. Modules import torch and
what else is heavy inside ``run``, so that help and errors in arguments come at once. Errors that
the user can mend are raised as :class:`~lightning_fastmoe.errors.FastMoEError`: one line, exit
status 2.
"""

from __future__ import annotations

from dataclasses import dataclass

PROGRAM = "lightning-fastmoe"
TRACEBACK_VARIABLE = "LIGHTNING_FASTMOE_TRACEBACK"
"""Set to 1 to see where an error was raised."""


@dataclass(frozen=True)
class Command:
    """A command, or a group of them.

    Attributes:
        summary: One line for the list of commands.
        module: The module that implements it, loaded when it is called.
    """

    summary: str
    module: str


COMMANDS = {
    "build": Command(
        "Compile the CUDA kernels ahead of time, for images and clusters.",
        "lightning_fastmoe.cli.build",
    ),
    "env": Command(
        "Print what was found on this machine, and whether the CUDA kernels run on it.",
        "lightning_fastmoe.cli.env",
    ),
    "checkpoint": Command(
        "Inspect, verify, compare, reshard, consolidate, export and import checkpoints.",
        "lightning_fastmoe.cli.checkpoint",
    ),
    "report": Command(
        "Show what the experts of a run did, as one HTML page.",
        "lightning_fastmoe.cli.report",
    ),
}

TRAINING = {
    "fit": "Train the example language model.",
    "validate": "Evaluate it on the validation set.",
    "test": "Evaluate it on the test set.",
    "predict": "Run it on a data set.",
}
"""The commands of LightningCLI."""
