"""Tokenize text files for pretraining: memory-mapped files of token ids, and their description.

  lightning-fastmoe tokenize corpus.jsonl.gz --tokenizer tokenizer.json --output data/corpus
  lightning-fastmoe tokenize docs README.md --train-tokenizer 4096 --output data/docs

A .txt, .md or .py file is a document, and so is each line of a .jsonl or .jsonl.gz file, with its
text under --text-key; folders are searched for such files. The tokenizer is a tokenizer.json of the
tokenizers library, or a byte-level BPE that is trained on the same text. Whether a document is for
training or validation depends only on its content and --seed.

DIR gets train.bin, val.bin, tokens.json and tokenizer.json, all when they are complete. Train on it
with lightning_fastmoe.demos.token_lm.TokenFiles, as examples/pretrain_lm.yaml does.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command."""
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", type=Path, help="text files, or folders of them"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="a tokenizer.json, or a folder with one"
    )
    which.add_argument(
        "--train-tokenizer",
        metavar="VOCAB_SIZE",
        type=int,
        help="train a byte-level BPE with this many tokens on the inputs first",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="the folder to write"
    )
    parser.add_argument(
        "--eos",
        metavar="TOKEN",
        help="the token after each document; default: <|endoftext|>, or another usual one",
    )
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        default="text",
        help="the text in each line of JSON; default: %(default)s",
    )
    parser.add_argument(
        "--val-fraction",
        metavar="FRACTION",
        type=float,
        default=0.01,
        help="fraction of the documents for validation; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which documents these are; default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace token files in DIR")
    parser.add_argument("--json", action="store_true", help="print tokens.json")


def run(arguments: argparse.Namespace) -> int:
    """Writes the token files; prints what they hold."""
    from lightning_fastmoe.cli.checkpoint.console import plural, print_text, progress
    from lightning_fastmoe.errors import ConfigError

    if not 0 <= arguments.val_fraction < 1:
        raise ConfigError(
            f"--val-fraction {arguments.val_fraction} is out of range: it must be at least 0 and"
            " below 1."
        )

    from lightning_fastmoe.demos.token_lm import documents, tokenizer, writer

    output: Path = arguments.output
    eos: str | None = arguments.eos
    files = documents.find_inputs(arguments.inputs)
    writer.check_output(output, files, arguments.force)
    size = documents.total_bytes(files)
    where = f"a tokenizer of {arguments.train_tokenizer} tokens"
    if arguments.train_tokenizer is None:
        content, file = tokenizer.read_tokenizer(arguments.tokenizer)
        where = str(file)
    else:
        with progress("training the tokenizer") as bar:
            bar.total(size)
            texts = documents.read_documents(files, arguments.text_key, bar.advance)
            content = tokenizer.train_tokenizer(texts, arguments.train_tokenizer, eos)
    encoder = tokenizer.DocumentEncoder(content, where, eos)
    with progress("tokenizing") as bar:
        bar.total(size)
        texts = documents.read_documents(files, arguments.text_key, bar.advance)
        manifest = writer.write_tokens(
            output, texts, content, encoder, arguments.val_fraction, arguments.seed
        )
    if arguments.json:
        print_text(manifest.to_json().rstrip())
        return 0
    counts = [
        f"{split.tokens:,} tokens of {plural(split.documents, 'document')} ({name})"
        for name, split in manifest.splits.items()
    ]
    print_text(f"{output}: {', '.join(counts)}; vocabulary {manifest.vocab_size:,}")
    return 0
