"""The LightningDataModule of chats in JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_fastmoe.demos.chat.answers import (
    IGNORED,
    Example,
    check_tokenizer,
    encode_chat,
)
from lightning_fastmoe.demos.chat.packing import pack
from lightning_fastmoe.demos.loaders import (
    evaluation_loader,
    no_loader,
    training_loader,
    world_size,
)
from lightning_fastmoe.errors import ConfigError, DataError


class ChatFiles(LightningDataModule):
    """Chats packed into rows, of which the assistant's answers are learned.

    A line of a file is a JSON object whose "messages" are dicts with "role" and "content". Batches
    are dicts for transformers' models: ``input_ids``, ``labels`` and ``position_ids``, each (batch,
    seq_len) int64. Positions restart with each chat, by which most models keep chats apart
    (:func:`~lightning_fastmoe.demos.chat.check_separation`). What is left of a row is padding, as a
    text of its own without labels. For models that don't, each chat has a row of its own, with an
    ``attention_mask`` instead of ``position_ids``.

    Args:
        path: the file of chats to train on.
        tokenizer: a fast tokenizer of transformers that has a chat template.
        val_path: the file of chats to validate on.
        seq_len: tokens in a row; longer chats are cut off.
        batch_size: rows per step and process.
        packed: whether chats share rows.
        num_workers: processes that load data.
        seed: order of the training rows.

    Raises:
        ConfigError: if an argument is out of range, or the tokenizer isn't suitable.
        DataError: if a file is missing, a line isn't a chat, or there are too few of them.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        val_path: str | Path | None = None,
        seq_len: int = 2048,
        batch_size: int = 1,
        packed: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more.")
        check_tokenizer(tokenizer)
        self.path = Path(path).expanduser()
        self.val_path = None if val_path is None else Path(val_path).expanduser()
        self.tokenizer = tokenizer
        self.seq_len, self.batch_size, self.packed = seq_len, batch_size, packed
        self.num_workers, self.seed = num_workers, seed
        # Read here, not in setup(): the first process reports a wrong line before it starts others.
        self._train = self._rows(self.path)
        self._val = None if self.val_path is None else self._rows(self.val_path)

    @override
    def setup(self, stage: str | None = None) -> None:
        needed = self.batch_size * world_size(self)
        if stage in ("fit", None) and len(self._train) < needed:
            raise DataError(
                f"{self.path} makes {len(self._train)} rows of {self.seq_len} tokens, and a step on"
                f" all processes takes {needed}. Lower seq_len or batch_size."
            )

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return training_loader(
            self,
            self._train,
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        if self._val is None:
            return no_loader()
        return evaluation_loader(self._val, self.batch_size, self.num_workers)

    def _rows(self, path: Path) -> Rows:
        examples: list[Example] = []
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        messages = _messages(line, where)
                        try:
                            examples += encode_chat(self.tokenizer, messages, self.seq_len)
                        except DataError as error:
                            raise DataError(f"{where}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} can't be read: {error}") from error
        if not examples:
            raise DataError(
                f"{path} has no answers of the role 'assistant' in the first {self.seq_len} tokens"
                " of its chats."
            )
        padding = self.tokenizer.pad_token_id
        if padding is None:
            padding = self.tokenizer.eos_token_id or 0
        return Rows(examples, self.seq_len, padding, packed=self.packed)


def _messages(line: str, where: str) -> list[dict[str, Any]]:
    try:
        chat = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages)
    ):
        raise DataError(f'{where}: "messages" must be a list of objects with a "role".')
    return messages


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of examples.

    Args:
        examples: the examples, none longer than a row.
        seq_len: the length of a row.
        padding: the id of the tokens that fill it up.
        packed: whether examples share rows.
    """

    def __init__(
        self, examples: list[Example], seq_len: int, padding: int, *, packed: bool
    ) -> None:
        self._examples, self._seq_len, self._padding = examples, seq_len, padding
        self._packed = packed
        lengths = [len(one.ids) for one in examples]
        self._rows = pack(lengths, seq_len) if packed else [[i] for i in range(len(examples))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = [self._examples[i] for i in self._rows[index]]
        tokens = sum(len(one.ids) for one in row)
        if left := self._seq_len - tokens:
            row.append(Example([self._padding] * left, [IGNORED] * left))
        batch = {
            "input_ids": torch.tensor([token for one in row for token in one.ids]),
            "labels": torch.tensor([label for one in row for label in one.labels]),
        }
        if self._packed:
            batch["position_ids"] = torch.cat([torch.arange(len(one.ids)) for one in row])
        else:
            batch["attention_mask"] = (torch.arange(self._seq_len) < tokens).long()
        return batch
