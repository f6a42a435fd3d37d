"""The argument parser of the training commands: no abbreviations, one-line errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from lightning_fastmoe.argument_types import parameters, suggestion

_USAGE_ERROR = 2
_UNKNOWN = (
    r"does not accept option '([^']+)'",
    r"unrecognized arguments: --([^\s=]+)",
    r"Option '([^']+)' is not accepted",
    r"Key '([^']+)' is not expected",
)
"""jsonargparse's messages for an unknown argument."""


class OneLineParser(LightningArgumentParser):
    """Reports errors in one line, without the usage text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `--model.num_expert 16` must be an error, not an abbreviation of another argument.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse is only probing
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = one_line(message, list(_options(parser)))
        program = parser.prog.replace(" [options]", "")
        if parser is self and self._subcommands_action is not None:
            program += " fit"  # all subcommands take its options
        self.exit(_USAGE_ERROR, f"error: {text} (see {program} --help)\n")


def one_line(message: str, known: list[str]) -> str:
    """The part of jsonargparse's message that matters, with a suggestion for a misspelt name.

    Args:
        message: lines, of which the innermost state the reason.
        known: names of all options, as ``model.num_experts``.
    """
    key = re.match(r'Parser key "([^"]+)":', message)
    of_class = re.search(
        r"^( *)- Problem with given class_path '([^']+)':\n", message, re.MULTILINE
    )
    if of_class is not None:
        inner = _indented(message[of_class.end() :], len(of_class[1]) + 2)
        known = _arguments_of(of_class[2])
        text = f"{key[1]}: " if key else ""
        text += f"{of_class[2]}: {_flat(inner)}"
    elif key is not None:
        text = f"{key[1]}: {_flat(message[key.end() :])}"
    else:
        text = _flat(message)
    for pattern in _UNKNOWN:
        if (unknown := re.search(pattern, text)) is not None:
            meant = suggestion(unknown[1], known)
            return f"{text}.{meant}" if meant else text
    return text


def _flat(text: str) -> str:
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"Expected an? <class '([\w.]+)'>", r"expected \1", text)
    return " ".join(text.split())


def _indented(text: str, depth: int) -> str:
    """The lines at the start of ``text`` that are indented by at least ``depth`` blanks."""
    lines = []
    for line in text.splitlines():
        if line.strip() and len(line) - len(line.lstrip()) < depth:
            break
        lines.append(line)
    return "\n".join(lines)


def _options(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):  # subcommands
            for inner in action.choices.values():
                if isinstance(inner, ArgumentParser):
                    yield from _options(inner)


def _arguments_of(class_path: str) -> list[str]:
    try:
        module, _, name = class_path.rpartition(".")
        bases = getattr(import_module(module), name).__mro__
    except Exception:  # importing a wrong path may raise anything
        return []
    return [
        name for base in bases if "__init__" in vars(base) for name in parameters(base.__init__)
    ]
