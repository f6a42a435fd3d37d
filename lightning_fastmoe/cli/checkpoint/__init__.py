"""Look into checkpoints, check them, and turn them into other files.

exit status:
  0    done; nothing is wrong, nothing differs
  1    verify found damage, diff found differences
  2    the arguments are wrong, or the checkpoint doesn't fit the request
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
    "inspect": "What a checkpoint holds: layers, experts, sizes, step and topology.",
    "verify": "Check every byte; list all damages.",
    "diff": "Compare two checkpoints tensor by tensor.",
    "reshard": "Lay the files out anew for another number of ranks.",
    "consolidate": "Write all weights into one safetensors or torch file.",
    "export": "Write a model that Hugging Face transformers loads.",
    "import": "Start from a model of Hugging Face transformers.",
}
"""Each is a module of this package that looks like a command (``cli/table.py``)."""

DAMAGED = 3
_USAGE_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and the arguments of each."""
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
    """Run the verb, and return its exit status."""
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
    suffix = "_" if verb == "import" else ""  # a keyword can't be the name of a module
    return importlib.import_module(f"{__name__}.{verb}{suffix}")
