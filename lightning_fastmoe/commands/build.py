"""Compile the CUDA kernels ahead of time, for images and clusters."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--arch", metavar="LIST", help="architectures")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build, and print where the library is."""
    from lightning_fastmoe.errors import ConfigError
    from lightning_fastmoe.ops import _build

    outcome = _build.build()
    if outcome.library is None:
        raise ConfigError(outcome.reason)
    sys.stdout.write(f"{outcome.library}\n")
    return 0
