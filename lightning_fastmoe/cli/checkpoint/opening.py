"""Arguments and checks shared by the verbs that read a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fastmoe.cli.checkpoint.console import progress

if TYPE_CHECKING:
    from lightning_fastmoe.checkpoint import CheckpointReader

DTYPES = ("float32", "bfloat16", "float16")


def add_source(parser: argparse.ArgumentParser, *, copies: bool = False) -> None:
    """Declares the checkpoint to read, and --no-verify for verbs that copy it."""
    parser.add_argument("checkpoint", type=Path, help="the checkpoint's directory")
    if copies:
        parser.add_argument(
            "--no-verify",
            action="store_true",
            help="don't check hashes first (by default a damaged checkpoint is not copied)",
        )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declares the dtype that weights are converted to."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert floating-point weights (default: as stored)"
    )


def torch_dtype(name: str | None) -> Any:
    """The ``torch.dtype`` of that name."""
    import torch

    return None if name is None else getattr(torch, name)


def verify_unless_told(
    reader: CheckpointReader, arguments: argparse.Namespace, *, weights: bool
) -> None:
    """Checks the hashes of the files to copy, unless --no-verify was given.

    Args:
        reader: the checkpoint.
        arguments: the command's; see :func:`add_source`.
        weights: whether to skip the optimizer's files.

    Raises:
        CheckpointError: naming the first damaged file.
    """
    if arguments.no_verify:
        return
    files = reader.manifest.files
    names = [n for n in files if not (weights and n.startswith("optimizer_"))]
    with progress("verifying") as bar:
        bar.total(sum(files[name].size for name in names))
        reader.verify(names, bar.advance)
