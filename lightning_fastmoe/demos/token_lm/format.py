"""The directory of token files that ``lightning-fastmoe tokenize`` writes.

``train.bin`` and ``val.bin`` are flat arrays of little-endian token ids, uint16 where the
vocabulary fits and uint32 otherwise; each document is followed by its end-of-text id, which occurs
nowhere else. ``tokens.json`` describes them, and ``tokenizer.json`` is the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import DataError

VERSION = 1
MANIFEST = "tokens.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "val")
ITEM_BYTES = {"uint16": 2, "uint32": 4}
_MAX_MANIFEST_BYTES = 2**20


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds all ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class Split:
    """The content of ``train.bin`` or ``val.bin``.

    Attributes:
        tokens: number of token ids, those that end documents included.
        documents: number of documents.
    """

    tokens: int
    documents: int


@dataclass(frozen=True)
class TokenManifest:
    """The content of ``tokens.json``.

    Attributes:
        dtype: "uint16" or "uint32", little-endian.
        vocab_size: the tokenizer's highest id + 1.
        eos: the token that ends documents.
        eos_id: its id.
        tokenizer_sha256: hash of ``tokenizer.json``, in hexadecimal.
        splits: "train" and "val" -> what their files hold.
    """

    dtype: str
    vocab_size: int
    eos: str
    eos_id: int
    tokenizer_sha256: str
    splits: Mapping[str, Split]

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"


def token_file(folder: Path, split: str) -> Path:
    """The path of a split's tokens."""
    return folder / f"{split}.bin"


def read_manifest(folder: Path) -> TokenManifest:
    """Reads ``tokens.json`` and compares the sizes of the token files with it.

    Raises:
        DataError: if there is none, or it and the token files contradict each other.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no tokens.json" if folder.is_dir() else "is not a folder"
        raise DataError(
            f"{str(folder)!r} {what}. Token files are written by"
            " `lightning-fastmoe tokenize INPUT --tokenizer FILE --output DIR`; give that DIR."
        )
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is too large for a tokens.json. Tokenize again.")
        manifest = _parse(json.loads(path.read_bytes()), path)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}). Tokenize again."
        ) from error
    for split in SPLITS:
        _check_size(token_file(folder, split), manifest, split)
    return manifest


def _parse(content: Any, path: Path) -> TokenManifest:
    version = content["version"]
    if version != VERSION:
        raise DataError(
            f"{path} has version {version!r}; this package reads version {VERSION}. Tokenize"
            " again, or install the version of the package that wrote it."
        )
    counts = content["splits"]
    splits = {
        name: Split(_count(counts[name], "tokens"), _count(counts[name], "documents"))
        for name in SPLITS
    }
    manifest = TokenManifest(
        dtype=str(content["dtype"]),
        vocab_size=_count(content, "vocab_size"),
        eos=str(content["eos"]),
        eos_id=_count(content, "eos_id"),
        tokenizer_sha256=str(content["tokenizer_sha256"]),
        splits=splits,
    )
    if manifest.dtype not in ITEM_BYTES or manifest.vocab_size > 256 ** ITEM_BYTES[manifest.dtype]:
        raise ValueError(f"dtype {manifest.dtype!r} for {manifest.vocab_size} tokens")
    if manifest.eos_id >= manifest.vocab_size:
        raise ValueError(f"eos_id {manifest.eos_id} of {manifest.vocab_size} tokens")
    return manifest


def _count(content: Mapping[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or value < 0:  # bool is a subclass of int
        raise ValueError(f"{name} is {value!r}")
    return value


def _check_size(path: Path, manifest: TokenManifest, split: str) -> None:
    expected = manifest.splits[split].tokens * ITEM_BYTES[manifest.dtype]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}. Tokenize again.") from error
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but tokens.json says {expected}"
            f" ({manifest.splits[split].tokens} tokens of {manifest.dtype}): it is truncated or"
            " belongs to another run. Copy or tokenize it again."
        )
