"""The commands of ``lightning-fastmoe`` other than LightningCLI's.

Each is a module with a docstring, which is its help text, and two functions::

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(arguments: argparse.Namespace) -> int: ...  # the exit status

A group of commands calls ``parser.add_subparsers`` in ``add_arguments``. Modules import torch and
other heavy packages inside ``run``, so that help and argument errors appear immediately. Errors
that the user can fix are raised as :class:`~lightning_fastmoe.errors.FastMoEError`: one line, exit
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
        summary: one line for the list of commands.
        module: the module that implements it, imported when it is called.
    """

    summary: str
    module: str


COMMANDS = {
    "build": Command(
        "Compile the CUDA kernels ahead of time, for container images and clusters.",
        "lightning_fastmoe.cli.build",
    ),
    "env": Command(
        "Print versions, GPUs and compiler, and whether the CUDA kernels run here.",
        "lightning_fastmoe.cli.env",
    ),
    "checkpoint": Command(
        "Inspect, verify, compare, reshard, consolidate, export and import checkpoints.",
        "lightning_fastmoe.cli.checkpoint",
    ),
    "report": Command(
        "Write an HTML page about the experts of a training run.",
        "lightning_fastmoe.cli.report",
    ),
    "plan": Command(
        "Predict the memory of training, or the time of passes with experts in host memory.",
        "lightning_fastmoe.cli.plan",
    ),
    "tokenize": Command(
        "Turn text into token files for pretraining, with a tokenizer of yours or a new one.",
        "lightning_fastmoe.cli.tokenize",
    ),
}

TRAINING = {
    "fit": "Train the example language model.",
    "validate": "Evaluate it on the validation set.",
    "test": "Evaluate it on the test set.",
    "predict": "Run it on a data set.",
}
"""The commands of LightningCLI."""
