"""Inspect, verify, compare and convert checkpoints.

exit status:
  0    success; no damage and no differences
  1    verify found damage, diff found differences
  2    the arguments are invalid, or don't fit the checkpoint
  3    a file is damaged or can't be read or written
  130  interrupted

With --json the result, or {"error": ...}, is one JSON object on stdout. Progress bars and messages
go to stderr; bars are shown on terminals only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from lightning_fastmoe.cli.checkpoint.console import print_json
from lightning_fastmoe.cli.table import TRACEBACK_VARIABLE
from lightning_fastmoe.errors import CheckpointError, FastMoEError

VERBS = {
    "inspect": "Show a checkpoint's contents: layers, experts, sizes, step and topology.",
    "verify": "Check every byte; list all damage.",
    "diff": "Compare two checkpoints tensor by tensor.",
    "reshard": "Rewrite the files for another number of ranks.",
    "consolidate": "Write all weights into one safetensors or torch file.",
    "export": "Write a model that Hugging Face transformers can load.",
    "import": "Convert a Hugging Face transformers model to a checkpoint.",
}
"""Verb -> summary. Each is a module here, with the interface of a command (``cli/table.py``)."""

DAMAGED = 3
_USAGE_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, summary in VERBS.items():
        module = _module(name)
        verb = verbs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb and returns its exit status."""
    try:
        return int(_module(arguments.verb).run(arguments))
    except (FastMoEError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if arguments.json:
            print_json({"error": str(error)})
        sys.stderr.write(f"error: {error}\n")
        return DAMAGED if isinstance(error, CheckpointError | OSError) else _USAGE_ERROR


def _module(verb: str) -> Any:
    suffix = "_" if verb == "import" else ""  # a keyword can't name a module
    return importlib.import_module(f"{__name__}.{verb}{suffix}")
