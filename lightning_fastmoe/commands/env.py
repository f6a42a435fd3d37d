"""Print what was found on this machine, and whether the CUDA kernels run on it."""

from __future__ import annotations

import argparse
import json
import platform
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from lightning_fastmoe import __version__

    found = {"lightning_fastmoe": __version__, "python": platform.python_version()}
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{name:20}{value}\n" for name, value in found.items()))
    return 0
