"""Windows of bytes from text files, for next-byte prediction.

The text of a folder is split into training and validation *by file*, so that validation never uses
a file that was trained on; a single file is split by position. Both splits depend only on relative
names and sizes, so they are identical on every rank and in every resumed run.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_fastmoe.demos.loaders import evaluation_loader, training_loader, world_size
from lightning_fastmoe.demos.windows import WindowStarts
from lightning_fastmoe.errors import DataError

FILE_SEPARATOR = 0
"""The byte before each file. It doesn't occur in text, so it marks the start of a file."""

_CACHE_FOLDERS = frozenset({"__pycache__", "node_modules"})
_TEST_FOLDERS = frozenset({"idle_test", "test", "tests"})
_INSTALLED_FOLDERS = frozenset({"dist-packages", "site-packages"})


def find_files(path: str | Path | None = None) -> tuple[Path, list[Path]]:
    """Lists the files of a corpus, sorted by relative name.

    Args:
        path: a file, or a folder to search recursively (hidden, cached and empty files are left
            out). None uses the source files of the running Python's standard library, without tests
            and installed packages.

    Returns:
        The folder that names are relative to, and the files.

    Raises:
        DataError: if ``path`` doesn't exist or contains no text file.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else Path(path).expanduser()
    if not root.exists():
        raise DataError(
            f"data.path {str(path)!r} does not exist (looked at {root.resolve()}). It must be a"
            " file or a folder of text. Correct the path, or leave it out to train on the Python"
            " standard library's source files."
        )
    if root.is_file():
        files, root = [root], root.parent
    else:
        pattern, skipped = "*", _CACHE_FOLDERS
        if path is None:
            pattern, skipped = "*.py", _CACHE_FOLDERS | _TEST_FOLDERS | _INSTALLED_FOLDERS
        files = []
        for file in root.rglob(pattern):
            parts = file.relative_to(root).parts
            hidden = any(part.startswith(".") for part in parts)
            if not hidden and skipped.isdisjoint(parts) and file.is_file():
                files.append(file)
    files = sorted(
        (file for file in files if _holds_text(file)), key=lambda file: _name(file, root)
    )
    if not files:
        raise DataError(
            f"data.path {str(path or root)!r} has no text. The corpus needs at least one readable"
            " file that is neither empty nor binary. Point data.path at a file or folder with text,"
            " or leave it out to train on the Python standard library's source files."
        )
    return root, sorted(files, key=lambda file: _name(file, root))


def split_files(
    root: Path, files: Sequence[Path], val_fraction: float
) -> tuple[list[Path], list[Path]]:
    """Splits files into training and validation by a hash of their relative names.

    A file stays in its split when others are added or removed. Both splits are sorted by hash,
    which mixes folders, so a prefix of a split is a fair sample of it.

    Args:
        root: the folder that names are relative to.
        files: at least two files.
        val_fraction: the fraction of files to validate on, between 0 and 1. Each split gets at
            least one file.

    Returns:
        The training files and the validation files.
    """
    ranked = sorted((_unit_hash(_name(file, root)), file) for file in files)
    cut = sum(value < val_fraction for value, _ in ranked)
    cut = min(max(cut, 1), len(ranked) - 1)
    return [file for _, file in ranked[cut:]], [file for _, file in ranked[:cut]]


def read_files(files: Sequence[Path], max_bytes: int | None = None) -> Tensor:
    """Reads files into one tensor, with :data:`FILE_SEPARATOR` before each.

    Args:
        files: the files to read, in this order.
        max_bytes: stop after this many bytes; None reads all.

    Returns:
        uint8, shape (bytes,).
    """
    text = bytearray()
    for file in files:
        text.append(FILE_SEPARATOR)
        text += file.read_bytes()
        if max_bytes is not None and len(text) >= max_bytes:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:max_bytes]


class ByteWindows(Dataset[Tensor]):
    """Contiguous windows of ``seq_len + 1`` bytes: ``seq_len`` inputs, shifted by one as targets.

    Adjacent windows share one byte, so that every byte but the first is a target exactly once.

    Args:
        text: uint8, shape (bytes,).
        seq_len: bytes that the model predicts per window.
        max_windows: keep this many, evenly spaced over the text; None keeps all.
    """

    def __init__(self, text: Tensor, seq_len: int, max_windows: int | None = None) -> None:
        self.text = text
        self.seq_len = seq_len
        self._starts = WindowStarts(text.numel(), seq_len, max_windows)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self._starts[index]
        return self.text[start : start + self.seq_len + 1]


class ByteCorpus(LightningDataModule):
    """Windows of bytes from a file, a folder, or the Python standard library's source files.

    Args:
        path: A text file or a folder of text files. Leave it out to use the source files of the
            Python that is running (about 11 MB; nothing is downloaded).
        seq_len: Bytes per window.
        batch_size: Windows per step and process.
        val_fraction: Share of the files (of the bytes, for a single file) kept for validation.
        max_bytes: Read at most this many bytes for training; everything by default.
        max_val_windows: Windows per validation run, evenly spaced over the validation text. `test`
            and `predict` use all of them.
        num_workers: Processes that load data. The text is in memory, so 0 is fastest.
        seed: Order of the training windows.

    Raises:
        DataError: if there is no text at `path`, or too little for a step on all processes.
    """

    def __init__(
        self,
        path: str | None = None,
        seq_len: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        max_bytes: int | None = None,
        max_val_windows: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "seq_len": seq_len,
            "batch_size": batch_size,
            "max_val_windows": max_val_windows,
            "max_bytes": 1 if max_bytes is None else max_bytes,
        }.items():
            if value < 1:
                raise DataError(f"data.{name} is {value}; it must be 1 or more.")
        if not 0.0 < val_fraction < 1.0:
            raise DataError(f"data.val_fraction is {val_fraction}; it must be between 0 and 1.")
        self.path = path
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.max_bytes = max_bytes
        self.max_val_windows = max_val_windows
        self.num_workers = num_workers
        self.seed = seed
        # Listed here, not in setup(), so that the first process reports a wrong path once, before
        # it starts the others.
        self._root, self._files = find_files(path)
        self._train_text: Tensor | None = None
        self._val_text: Tensor | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._train_text is not None:
            return
        if len(self._files) > 1:
            train, val = split_files(self._root, self._files, self.val_fraction)
            train_text, val_text = read_files(train, self.max_bytes), read_files(val)
        else:
            # Mapped, not read: a file larger than memory is fine.
            file = self._files[0]
            text = torch.from_file(
                str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8
            )
            cut = text.numel() - max(1, int(text.numel() * self.val_fraction))
            train_text, val_text = text[:cut][: self.max_bytes], text[cut:]
        self._check_size("training", train_text, self.batch_size * world_size(self))
        self._check_size("validation", val_text, 1)
        self._train_text, self._val_text = train_text, val_text

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        return training_loader(
            self,
            self._windows(self._train_text),
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._evaluation_loader(self.max_val_windows)

    @override
    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._evaluation_loader(None)

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._evaluation_loader(None)

    def _evaluation_loader(self, max_windows: int | None) -> DataLoader[Tensor]:
        windows = self._windows(self._val_text, max_windows)
        return evaluation_loader(windows, self.batch_size, self.num_workers)

    def _windows(self, text: Tensor | None, max_windows: int | None = None) -> ByteWindows:
        if text is None:
            raise DataError("The corpus isn't read yet: call setup() before asking for loaders.")
        return ByteWindows(text, self.seq_len, max_windows)

    def _check_size(self, split: str, text: Tensor, windows: int) -> None:
        needed = windows * self.seq_len + 1
        if text.numel() < needed:
            raise DataError(
                f"The {split} text of {str(self.path or self._root)!r} has {text.numel()} bytes; "
                f"{windows} window(s) of seq_len {self.seq_len} on {world_size(self)} process(es) "
                f"need {needed}. Use more text, or lower data.seq_len or data.batch_size."
            )


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _unit_hash(name: str) -> float:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _holds_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            start = stream.read(1024)
    except OSError:
        return False
    return bool(start) and b"\0" not in start
