"""Rewrite a checkpoint's files as if another number of ranks had saved it.

This is not needed for loading: a checkpoint resumes on any number of ranks as it is. It is for
storage and networks that prefer more, smaller files or fewer, larger ones. Everything is kept,
including the state of each rank's random number generators.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_fastmoe.cli.checkpoint.console import print_json, print_text, progress
from lightning_fastmoe.cli.checkpoint.opening import add_source, verify_unless_told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_source(parser, copies=True)
    parser.add_argument("output", type=Path, help="the new checkpoint's directory")
    parser.add_argument(
        "--ranks", type=int, required=True, metavar="N", help="number of ranks to write files for"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUTPUT, which may be the same checkpoint"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the new checkpoint."""
    from lightning_fastmoe.checkpoint import CheckpointReader
    from lightning_fastmoe.checkpoint.tools.reshard import reshard
    from lightning_fastmoe.errors import ConfigError

    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} is invalid: it must be at least 1.")
    if os.path.lexists(arguments.output) and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} exists already: pass --overwrite to replace it.")
    with CheckpointReader(arguments.checkpoint) as reader:
        verify_unless_told(reader, arguments, weights=False)
        with progress("writing") as bar:
            bar.total(sum(record.size for record in reader.manifest.tensors.values()))
            reshard(reader, arguments.output, arguments.ranks, bar.advance)
    with CheckpointReader(arguments.output) as written:
        files = {name: record.size for name, record in written.manifest.files.items()}
    if arguments.json:
        print_json({"path": str(arguments.output), "ranks": arguments.ranks, "files": files})
    else:
        print_text(f"{arguments.output}: {len(files)} files for {arguments.ranks} ranks.")
    return 0
