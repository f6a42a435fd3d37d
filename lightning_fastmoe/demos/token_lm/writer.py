"""Documents into token files: streamed, and published when complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lightning_fastmoe.demos.token_lm.format import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Split,
    TokenManifest,
    dtype_for,
    token_file,
)
from lightning_fastmoe.demos.token_lm.tokenizer import DocumentEncoder
from lightning_fastmoe.errors import ConfigError, DataError

_BATCH_CHARACTERS = 2**22
_BATCH_DOCUMENTS = 2**12
"""Documents are encoded together, on all cores, until one of these is reached."""


def check_output(output: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuses to overwrite what the user may want to keep.

    Raises:
        ConfigError: if ``output`` exists and ``force`` is not given or it holds no token files, or
            an input is inside it.
    """
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise ConfigError(
                f"The input {str(path)!r} is inside of --output {str(output)!r}, which is replaced."
                " Choose another --output."
            )
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise ConfigError(
            f"--output {str(output)!r} exists and holds no token files. Choose another name."
        )
    if not force:
        raise ConfigError(
            f"--output {str(output)!r} exists already. Choose another name, or replace it with"
            " --force."
        )


def is_validation(text: str, val_fraction: float, seed: int) -> bool:
    """Whether a document is for validation; equal documents are in the same split."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def write_tokens(
    output: Path,
    documents: Iterable[str],
    tokenizer: bytes,
    encoder: DocumentEncoder,
    val_fraction: float,
    seed: int,
) -> TokenManifest:
    """Writes a directory of token files; it replaces ``output`` when it is complete.

    Memory does not grow with the number of documents.

    Args:
        output: the directory, which :func:`check_output` has accepted.
        documents: their texts, none of them empty.
        tokenizer: the content of its ``tokenizer.json``, which is copied.
        encoder: the same tokenizer.
        val_fraction: the expected fraction of documents for validation, 0 (none) or more and
            below 1.
        seed: which documents these are.

    Raises:
        ConfigError: if ``output`` can't be written.
        DataError: if a split that should have documents has none.
    """
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError(
            f"--output {str(output)!r} can't be written: {error.strerror}."
        ) from error
    try:
        splits = _write_splits(partial, documents, encoder, val_fraction, seed)
        manifest = TokenManifest(
            dtype=dtype_for(encoder.vocab_size),
            vocab_size=encoder.vocab_size,
            eos=encoder.eos,
            eos_id=encoder.eos_id,
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            splits=splits,
        )
        (partial / TOKENIZER).write_bytes(tokenizer)
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        partial.chmod(0o777 & ~_umask())  # mkdtemp's are for their owner alone
        _publish(partial, output)
    except OSError as error:  # a full disk
        raise ConfigError(
            f"--output {str(output)!r} can't be written: {error.strerror}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_splits(
    folder: Path,
    documents: Iterable[str],
    encoder: DocumentEncoder,
    val_fraction: float,
    seed: int,
) -> dict[str, Split]:
    dtype = np.dtype(dtype_for(encoder.vocab_size)).newbyteorder("<")
    tokens, counts = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context(token_file(folder, name).open("wb")) for name in SPLITS}
        for batch in _batches(documents):
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                split = "val" if is_validation(text, val_fraction, seed) else "train"
                files[split].write(np.array(ids, dtype).tobytes())
                tokens[split] += len(ids)
                counts[split] += 1
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    _check_not_empty(counts, val_fraction)
    return {name: Split(tokens[name], counts[name]) for name in SPLITS}


def _check_not_empty(counts: dict[str, int], val_fraction: float) -> None:
    total = sum(counts.values())
    if not total:
        raise DataError("The input has no documents, or only empty ones. Give some text.")
    for split, wanted in (("train", True), ("val", val_fraction > 0)):
        if wanted and not counts[split]:
            raise DataError(
                f"None of the {total} documents is in the {split} split at --val-fraction"
                f" {val_fraction}. Change --val-fraction (0 for no validation) or --seed."
            )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _publish(partial: Path, output: Path) -> None:
    """Puts ``partial`` in the place of ``output``, which stays if this fails."""
    if not output.exists():
        partial.rename(output)
        return
    former = partial.with_name(f"{partial.name}.former")
    try:
        output.rename(former)
        partial.rename(output)
    except BaseException:  # Ctrl-C as well
        if former.exists() and not output.exists():
            former.rename(output)
        raise
    shutil.rmtree(former)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
