"""A tokenizer of the ``tokenizers`` library: loading it, training it, and encoding documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from lightning_fastmoe.demos.token_lm.format import TOKENIZER
from lightning_fastmoe.errors import ConfigError, DataError, MissingPackageError

COMMON_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that end documents in well-known tokenizers. The first is that of trained ones."""

MIN_VOCAB_SIZE = 257
"""All bytes, and the end-of-text token."""


class DocumentEncoder:
    """Turns documents into token ids, each followed by the end-of-text id.

    A document's text is only text: what looks like a special token in it is not made one, and
    nothing is added, truncated or padded, whatever the tokenizer's file asks for.

    Args:
        content: the ``tokenizer.json``.
        where: its path, for messages.
        eos: the end-of-text token; None takes the only one of :data:`COMMON_EOS` that exists.

    Attributes:
        eos: the end-of-text token.
        eos_id: its id.
        vocab_size: the highest id + 1.

    Raises:
        ConfigError: if there is no such token, or ``eos`` is None and the choice is not clear.
        DataError: if ``content`` is not a tokenizer.
        MissingPackageError: if tokenizers is not installed.
    """

    def __init__(self, content: bytes, where: str, eos: str | None) -> None:
        library = import_tokenizers()
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as error:  # what it raises depends on its version
            raise DataError(f"{where} is not a tokenizer.json of tokenizers: {error}.") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{where} has no tokens.")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos = _choose_eos(vocabulary, where, eos)
        self.eos_id = vocabulary[self.eos]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each document, on all cores.

        Raises:
            DataError: if the end-of-text token occurs within a document.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids: list[list[int]] = [encoding.ids for encoding in encodings]
        for text, row in zip(texts, ids, strict=True):
            if self.eos_id in row:
                raise DataError(
                    f"The end-of-text token {self.eos!r} occurs within a document"
                    f" ({text[:40]!r}...), which would split it. Choose a special token of the"
                    " tokenizer with --eos."
                )
            row.append(self.eos_id)
        return ids


def _choose_eos(vocabulary: dict[str, int], where: str, eos: str | None) -> str:
    candidates = [token for token in COMMON_EOS if token in vocabulary]
    if eos is None and len(candidates) == 1:
        return candidates[0]
    if eos is not None and eos in vocabulary:
        return eos
    found = f"it has {', '.join(candidates)}" if candidates else "it has no common one"
    wanted = "No end-of-text token is given" if eos is None else f"There is no token {eos!r}"
    raise ConfigError(f"{wanted} for {where}: {found}. Name the token with --eos.")


def read_tokenizer(path: Path) -> tuple[bytes, Path]:
    """The content of a ``tokenizer.json``, and its path.

    Args:
        path: the file, or a folder that holds one.

    Raises:
        DataError: if there is none.
    """
    file = path / TOKENIZER if path.is_dir() else path
    try:
        return file.read_bytes(), file
    except OSError as error:
        raise DataError(
            f"--tokenizer: {file} can't be read: {error.strerror}. Give a tokenizer.json of the"
            " tokenizers library or a folder that holds one, or train one with --train-tokenizer."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos: str | None) -> bytes:
    """Trains a byte-level BPE (as GPT-2's), and returns its ``tokenizer.json``.

    Any text can be encoded, and decodes to itself. The vocabulary is smaller than asked for if
    the texts have too few different words.

    Args:
        texts: documents; only the counts of their words are kept in memory.
        vocab_size: at least :data:`MIN_VOCAB_SIZE`.
        eos: the end-of-text token; None is "<|endoftext|>".

    Raises:
        ConfigError: if ``vocab_size`` is too small.
        MissingPackageError: if tokenizers is not installed.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--train-tokenizer {vocab_size} is too small: the vocabulary has at least"
            f" {MIN_VOCAB_SIZE} tokens, all bytes and the end of text."
        )
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[COMMON_EOS[0] if eos is None else eos],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: str = tokenizer.to_str(pretty=True)
    return content.encode()


def import_tokenizers() -> ModuleType:
    """The library.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "Tokenizing needs the tokenizers library: pip install 'lightning-fastmoe[text]'"
        ) from error
    return tokenizers
