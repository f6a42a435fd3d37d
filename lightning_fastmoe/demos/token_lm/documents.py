"""The documents of text files: which files, and what is in them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from lightning_fastmoe.errors import DataError

TEXT = (".txt", ".md", ".py")
"""A file of these is one document."""

LINES = (".jsonl", ".jsonl.gz")
"""A line of these is one document."""

MAX_DOCUMENT_BYTES = 2**25
"""Tokenizers need a document in memory as a whole, many times its size."""


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The files to read: those given, in this order, and those in given folders, sorted by name.

    In folders, hidden files and files of other kinds are left out.

    Raises:
        DataError: if a path does not exist, or is a file of an unknown kind.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(_in_folder(path))
        elif not path.is_file():
            raise DataError(f"{str(path)!r} does not exist. Give files, or folders of them.")
        elif not path.name.endswith(TEXT + LINES):
            raise DataError(
                f"{str(path)!r} is of an unknown kind. A document is a file ({', '.join(TEXT)}), or"
                f" a line of JSON ({', '.join(LINES)}). Rename or convert it."
            )
        else:
            files.append(path)
    return files


def _in_folder(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.name.endswith(TEXT + LINES) and path.is_file():
            yield path


def read_documents(
    files: Iterable[Path], text_key: str, advance: Callable[[int], None]
) -> Iterator[str]:
    """The texts of all documents but empty ones, one at a time.

    Args:
        files: from :func:`find_inputs`.
        text_key: the key of a document's text, in lines of JSON.
        advance: is called with the number of bytes read since the last call.

    Raises:
        DataError: if a file can't be read, isn't UTF-8 or has a document that is too long, or a
            line is no JSON object with a string under ``text_key``.
    """
    for path in files:
        try:
            yield from (text for text in _documents(path, text_key, advance) if text)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} can't be read: {reason}.") from error


def _documents(path: Path, text_key: str, advance: Callable[[int], None]) -> Iterator[str]:
    if not path.name.endswith(LINES):
        with path.open("rb") as stream:
            content = _bounded(stream.read(MAX_DOCUMENT_BYTES + 1), str(path))
        advance(len(content))
        yield _decoded(content, str(path))
        return
    with path.open("rb") as raw:
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        done, number = 0, 0
        while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            text = _text_of(_bounded(line, where), text_key, where)
            position = raw.tell()
            advance(position - done)
            done = position
            yield text


def _bounded(content: bytes, where: str) -> bytes:
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{where} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB, and a document is tokenized"
            " as a whole. Split it into documents, for example one per line of a .jsonl file."
        )
    return content


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte {error.start} is {content[error.start]:#04x}. Convert it."
        ) from error


def _text_of(line: bytes, text_key: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        content = json.loads(_decoded(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{where} is not a JSON object, as {{{text_key!r}: ...}}.")
    if text_key not in content:
        keys = ", ".join(map(repr, content)) or "none"
        raise DataError(
            f"{where} has no key {text_key!r}; its keys are: {keys}. Name the one with the text"
            " with --text-key."
        )
    text = content[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where} has a value of type {type(text).__name__} under {text_key!r}, not a text."
            " Name the key of the text with --text-key."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair at character {error.start}, which is no text."
            " Remove it."
        ) from error
    return text


def total_bytes(files: Iterable[Path]) -> int:
    """The size of all files, compressed as they are."""
    return sum(os.stat(path).st_size for path in files)
