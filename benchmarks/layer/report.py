"""Where the scripts leave what they found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`write` follows."""
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--markdown", type=Path, help="file to write")


def write(arguments: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    """Writes the files that the command line asks for.

    Args:
        arguments: parsed arguments with the options of :func:`add_options`.
        report: content of the JSON file.
        text: content of the Markdown file.
    """
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
