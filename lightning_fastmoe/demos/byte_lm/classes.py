"""Whether a command line trains the example's classes, or others that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import yaml

_SECTIONS = ("model", "data")
_CONFIG = ("-c", "--config")


def names_a_class(words: Sequence[str]) -> bool:
    """Whether arguments or a configuration file give the class of the model or of the data.

    Files that can't be read are left to the parser, whose errors are better.
    """
    options = tuple(f"--{section}{end}" for section in _SECTIONS for end in ("", ".class_path"))
    if any(word.split("=")[0] in options for word in words):
        return True
    return any(_file_names_a_class(Path(file)) for file in _configs(words))


def _configs(words: Sequence[str]) -> Iterator[str]:
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, is_one_word, value = word.partition("=")
        if name in _CONFIG:
            yield value if is_one_word else following


def _file_names_a_class(file: Path) -> bool:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(content, dict):
        return False
    sections = [content.get(name) for name in _SECTIONS]
    return any(isinstance(section, dict) and "class_path" in section for section in sections)
