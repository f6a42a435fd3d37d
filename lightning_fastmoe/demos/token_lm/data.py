"""The LightningDataModule of token files."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_fastmoe.demos.loaders import (
    evaluation_loader,
    no_loader,
    training_loader,
    world_size,
)
from lightning_fastmoe.demos.token_lm.format import read_manifest
from lightning_fastmoe.demos.token_lm.windows import TokenWindows
from lightning_fastmoe.errors import ConfigError, DataError


class TokenFiles(LightningDataModule):
    """Windows of token ids from the files that `lightning-fastmoe tokenize` writes.

    Each epoch has all training windows once, in another order. A resumed run continues within an
    epoch, also on another number of processes if the windows of a step over all processes are as
    many or divide those that are done.

    Args:
        path: The folder that `lightning-fastmoe tokenize` wrote. The files are memory-mapped.
        seq_len: Predictions per window; windows have one token more. 1023 makes windows of 1024.
        batch_size: Windows per step and process.
        max_val_windows: Windows per validation run, evenly spaced over the validation text. `test`
            uses all of them.
        separate_documents: Whether a document sees only itself. It takes an attention mask, which
            costs memory and the fastest kernels; without, a window is one text, in which the
            end-of-text token separates documents.
        num_workers: Processes that load data.
        seed: Order of the training windows.

    Raises:
        ConfigError: if the data has more tokens than the model's vocabulary.
        DataError: if `path` holds no token files or damaged ones, or too little for a step on all
            processes.
    """

    def __init__(
        self,
        path: str,
        seq_len: int = 1023,
        batch_size: int = 8,
        max_val_windows: int = 512,
        separate_documents: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "seq_len": seq_len,
            "batch_size": batch_size,
            "max_val_windows": max_val_windows,
        }.items():
            if value < 1:
                raise DataError(f"data.{name} is {value}; it must be 1 or more.")
        if num_workers < 0:
            raise DataError(f"data.num_workers is {num_workers}; it must be 0 or more.")
        self.path = Path(path).expanduser()
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.max_val_windows = max_val_windows
        self.separate_documents = separate_documents
        self.num_workers = num_workers
        self.seed = seed
        # Read here, not in setup(), so that the first process reports a wrong path once, before
        # it starts the others.
        self.manifest = read_manifest(self.path)

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary that a model of this data can have."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The id that ends documents."""
        return self.manifest.eos_id

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self._check_vocabulary(self.trainer.lightning_module)
        if stage in ("fit", None):
            self._check_size("train", self.batch_size * world_size(self))
        if stage == "test" or (stage != "predict" and self.manifest.splits["val"].tokens):
            self._check_size("val", 1)

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return training_loader(
            self,
            self._windows("train"),
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        if not self.manifest.splits["val"].tokens:
            return no_loader()  # tokenized with --val-fraction 0
        windows = self._windows("val", self.max_val_windows)
        return evaluation_loader(windows, self.batch_size, self.num_workers)

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return evaluation_loader(self._windows("val"), self.batch_size, self.num_workers)

    def _windows(self, split: str, max_windows: int | None = None) -> TokenWindows:
        return TokenWindows(
            self.path,
            self.manifest,
            split,
            self.seq_len,
            max_windows,
            separate_documents=self.separate_documents,
        )

    def _check_size(self, split: str, windows: int) -> None:
        needed = windows * self.seq_len + 1
        tokens = self.manifest.splits[split].tokens
        if tokens < needed:
            raise DataError(
                f"{split}.bin of {str(self.path)!r} has {tokens} tokens; {windows} window(s) of"
                f" seq_len {self.seq_len} on {world_size(self)} process(es) need {needed}. Tokenize"
                " more text, or lower data.seq_len or data.batch_size."
            )

    def _check_vocabulary(self, model: LightningModule) -> None:
        size = vocabulary_of(model)
        if size is not None and size < self.vocab_size:
            raise ConfigError(
                f"The tokens of {str(self.path)!r} have a vocabulary of {self.vocab_size}, the"
                f" model one of {size}. Use a model with at least that many tokens, or tokenize"
                " with the model's own tokenizer."
            )


def vocabulary_of(model: LightningModule) -> int | None:
    """The size of a model's vocabulary, None if it is not known (yet)."""
    owner = model if hasattr(model, "vocab_size") else getattr(model, "architecture", None)
    size = getattr(owner, "vocab_size", None)
    return size if isinstance(size, int) else None
