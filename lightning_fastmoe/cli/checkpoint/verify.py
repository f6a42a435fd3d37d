"""Check every byte of a checkpoint and list all damage.

Compares the size and SHA-256 of each file, and checks that every expert of every layer, and every
other element of every tensor, exists exactly once. No pickle is executed. Exit status 1 means that
something is damaged; the report names files and tensors.
"""

from __future__ import annotations

import argparse

from lightning_fastmoe.cli.checkpoint.console import (
    plural,
    print_json,
    print_text,
    progress,
    readable,
)
from lightning_fastmoe.cli.checkpoint.opening import add_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_source(parser)
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="accept an objects.pt with objects of any class (not loaded; its hash is checked)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints all damage, or that there is none."""
    from lightning_fastmoe.checkpoint.tools.verify import Audit

    with progress("verifying") as bar:
        audit = Audit(
            arguments.checkpoint,
            trusted=arguments.trusted,
            on_total=bar.total,
            on_bytes=bar.advance,
        )
        damages = list(audit.damages())
    manifest = audit.manifest
    files = manifest.files if manifest else {}
    experts = manifest.moe_layers if manifest else {}
    size = sum(record.size for record in files.values())
    if arguments.json:
        print_json(
            {
                "path": str(audit.path),
                "ok": not damages,
                "damages": [{"file": d.file, "message": d.message} for d in damages],
                "files": len(files),
                "bytes": size,
                "experts": experts,
            }
        )
    elif damages:
        print_text(*(f"damaged: {d.message}" for d in damages))
        print_text(f"{plural(len(damages), 'damage')} found.")
    else:
        print_text(
            f"{audit.path}: {plural(len(files), 'file')} ({readable(size)}) as written;"
            f" experts: {sum(experts.values())} in {plural(len(experts), 'layer')}, each once."
        )
    return 1 if damages else 0
