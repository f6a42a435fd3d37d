"""Compare two checkpoints tensor by tensor: names, shapes, dtypes and values.

The layout of the files and the number of ranks that wrote them don't matter. Values are equal if
they are bitwise equal, or within --atol + --rtol * max(|a|, |b|). Exit status 1 means that
something differs. Hashes are not checked; use verify for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fastmoe.cli.checkpoint.console import plural, print_json, print_text, progress, table

if TYPE_CHECKING:
    from lightning_fastmoe.checkpoint.tools.diff import Difference

_SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("first", type=Path, help="a checkpoint's directory")
    parser.add_argument("second", type=Path, help="another checkpoint's directory")
    parser.add_argument("--weights-only", action="store_true", help="ignore optimizer states")
    parser.add_argument("--atol", type=float, default=0.0, metavar="X", help="absolute tolerance")
    parser.add_argument("--rtol", type=float, default=0.0, metavar="X", help="relative tolerance")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences."""
    from lightning_fastmoe.checkpoint import CheckpointReader
    from lightning_fastmoe.checkpoint.tools.diff import bytes_to_compare, compare
    from lightning_fastmoe.errors import ConfigError

    if not (arguments.atol >= 0 and arguments.rtol >= 0):
        raise ConfigError("--atol and --rtol must be numbers of at least 0.")
    prefix = "weights/" if arguments.weights_only else ""
    with (
        CheckpointReader(arguments.first) as first,
        CheckpointReader(arguments.second) as second,
        progress("comparing") as bar,
    ):
        bar.total(bytes_to_compare(first, second, prefix))
        found = list(
            compare(
                first,
                second,
                prefix=prefix,
                atol=arguments.atol,
                rtol=arguments.rtol,
                on_bytes=bar.advance,
            )
        )
        compared = [n for n in first.manifest.tensors if n.startswith(prefix)]
        steps = [r.manifest.progress.get("global_step") for r in (first, second)]
    if arguments.json:
        print_json(
            {
                "first": {"path": str(first.path), "step": steps[0]},
                "second": {"path": str(second.path), "step": steps[1]},
                "equal": not found,
                "tensors": len(compared),
                "differences": [_entry(d) for d in found],
            }
        )
    elif found:
        print_text(*_lines(found))
    else:
        exact = arguments.atol == arguments.rtol == 0
        how = "equal bit by bit" if exact else "equal within the tolerance"
        print_text(f"{len(compared)} tensors are {how} (steps {steps[0]} and {steps[1]}).")
    return 1 if found else 0


def _entry(d: Difference) -> dict[str, Any]:
    return vars(d)


def _lines(found: list[Difference]) -> list[str]:
    rows = [["tensor", "differs in", "elements", "max abs", "max rel"]]
    for d in found[:_SHOWN]:
        what = f"{d.kind}: {d.detail}" if d.detail else d.kind
        numbers = [str(d.elements), f"{d.max_abs:.3g}", f"{d.max_rel:.3g}"]
        rows.append([d.tensor, what, *(numbers if d.kind in ("values", "dtype") else [""] * 3)])
    more = len(found) - _SHOWN
    rest = [f"... and {more} more; --json lists all."] if more > 0 else []
    count = f"{plural(len(found), 'tensor')} {'differs' if len(found) == 1 else 'differ'}."
    return [*table(rows), *rest, count]
