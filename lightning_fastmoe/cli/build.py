"""Compile the CUDA kernels ahead of time, for container images and clusters.

Otherwise they are compiled when a process first needs them. Requires nvcc, but no GPU.

  lightning-fastmoe build                       for the GPUs of this machine
  lightning-fastmoe build --arch '8.0;9.0a'     for A100 and H100, on any machine
  lightning-fastmoe build --arch 9.0a --output kernels.so

The library goes into the cache (~/.cache/lightning_fastmoe, or LIGHTNING_FASTMOE_CACHE), where runs
on matching GPUs find it; if it is there already, nothing is compiled. With --output it goes into a
separate file, which a run uses if LIGHTNING_FASTMOE_LIBRARY names it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command."""
    parser.add_argument(
        "--arch",
        metavar="LIST",
        help="architectures, as '8.0;9.0a'; default: TORCH_CUDA_ARCH_LIST, else the local GPUs",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="write this file, or kernels.so in this folder, instead of the cache",
    )
    parser.add_argument("--force", action="store_true", help="compile even if it exists already")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Builds the library and prints its path."""
    from lightning_fastmoe.ops._build.ahead import build_ahead

    start = time.perf_counter()
    ahead = build_ahead(arguments.arch, arguments.output, arguments.force)
    seconds = time.perf_counter() - start
    record = ahead.record
    if arguments.json:
        found = {
            "library": str(ahead.library.absolute()),
            "compiled": ahead.compiled,
            "architectures": list(record.codes),
            "cuda": record.cuda,
            "torch": record.torch,
            "machine": record.machine,
            "sources": record.sources,
            "seconds": round(seconds, 3),
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    what = f"compiled in {seconds:.0f} s" if ahead.compiled else "exists already"
    codes = ", ".join(record.codes)
    sys.stdout.write(f"{ahead.library}: {what} ({codes}; CUDA {record.cuda})\n")
    if arguments.output is not None:
        sys.stdout.write(f"To use it: LIGHTNING_FASTMOE_LIBRARY={ahead.library.absolute()}\n")
    return 0
