"""Contiguous streams of bytes, one per row of the batch, read segment after segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.demos.byte_lm.data import ByteCorpus, ByteWindows
from lightning_fastmoe.demos.loaders import world_size
from lightning_fastmoe.demos.transformer_xl.memory import Memory
from lightning_fastmoe.errors import DataError


class Segment(NamedTuple):
    """A batch: the next segment of each of this rank's streams.

    Attributes:
        tokens: uint8, (batch, seq_len + 1): the inputs, shifted by one the targets.
        starts: whether the streams start here, so that nothing before it is remembered.
    """

    tokens: Tensor
    starts: bool


class SegmentLoader:
    """Reads text as ``world_size * batch_size`` streams of equal length, side by side.

    Stream ``rank * batch_size + b`` is row b of this rank's batches, and batch s holds segment s of
    each, so that a row continues where it ended in the batch before. A rest of the text that fills
    no segment of every stream is left out. An epoch reads each stream once, from its start.

    A run that resumes within an epoch continues with the next segment. On the same number of ranks
    with the same ``batch_size`` and ``seq_len`` it also has the memory back: each rank's loaders
    have a state of their own in a checkpoint. Otherwise the memory starts empty, with a warning.

    Args:
        windows: the text as adjacent windows of ``seq_len + 1`` bytes.
        batch_size: streams per rank.
        rank: this process's rank.
        world_size: number of ranks.
        max_segments: read at most this many of each stream; None reads all.
        limit: the Trainer's ``limit_train_batches``; an epoch may end before the streams do.
        memory: what the model that is trained remembers of the streams, to be saved with the
            position; None saves the position alone.
    """

    def __init__(
        self,
        windows: ByteWindows,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_segments: int | None = None,
        limit: int | float = 1.0,
        memory: Memory | None = None,
    ) -> None:
        self._windows = windows
        self._num_streams = batch_size * world_size
        self._per_stream = len(windows) // self._num_streams
        self._rows = range(rank * batch_size, (rank + 1) * batch_size)
        self._length = min(self._per_stream, max_segments or self._per_stream)
        whole = isinstance(limit, int)
        self._epoch_length = min(limit, self._length) if whole else int(limit * self._length)
        self._layout = {
            "rank": rank,
            "world_size": world_size,
            "batch_size": batch_size,
            "seq_len": windows.seq_len,
        }
        self._memory = memory
        self._done = self._resume_at = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Segment]:
        self._done, self._resume_at = self._resume_at, 0
        for index in range(self._done, self._length):
            rows = [self._windows[row * self._per_stream + index] for row in self._rows]
            self._done += 1
            yield Segment(torch.stack(rows), starts=index == 0)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch and the memory, for a checkpoint."""
        done = self._resume_at or self._done  # the former until the first batch is read
        done = done if done < self._epoch_length else 0
        memory = None if self._memory is None or not done else self._memory.state_dict()
        position = done * self._num_streams * self._windows.seq_len
        return {"bytes": position, "layout": self._layout, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts the next pass at the saved position; later passes are complete."""
        segments = state["bytes"] // (self._num_streams * self._windows.seq_len)
        self._resume_at = segments % self._length
        if self._memory is None:
            return
        self._memory.reset()
        if state["memory"] is None:
            return
        if state["layout"] == self._layout:
            self._memory.load_state_dict(state["memory"])
        else:
            rank_zero_warn(
                f"The checkpoint's memory is that of {state['layout']}, and this run has "
                f"{self._layout}: other streams or segments. The memory starts empty. "
                "To continue with it, resume on as many ranks with the same batch_size and seq_len."
            )


class ByteStreams(ByteCorpus):
    """Streams of bytes from a file, a folder, or the Python standard library's source files.

    The memory of a model with a ``memory`` is saved with the position of the training data.

    Args:
        path: A text file or a folder of text files. Leave it out to use the source files of the
            Python that is running (about 11 MB; nothing is downloaded).
        seq_len: Bytes per segment.
        batch_size: Streams per process, each of them a row of the batch.
        val_fraction: Share of the files (of the bytes, for a single file) kept for validation.
        max_bytes: Read at most this many bytes for training; everything by default.
        max_val_segments: Segments of each stream per validation run, from its start. `test` and
            `predict` read all.

    Raises:
        DataError: if there is no text at `path`, or too little for a segment of each stream.
    """

    def __init__(
        self,
        path: str | None = None,
        seq_len: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        max_bytes: int | None = None,
        max_val_segments: int = 32,
    ) -> None:
        super().__init__(path, seq_len, batch_size, val_fraction, max_bytes)
        if max_val_segments < 1:
            raise DataError(f"data.max_val_segments is {max_val_segments}; it must be 1 or more.")
        self.max_val_segments = max_val_segments

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        assert self._val_text is not None
        self._check_size("validation", self._val_text, self.batch_size * world_size(self))

    @override
    def train_dataloader(self) -> SegmentLoader:  # type: ignore[override]
        if self.trainer is None:
            return self._loader(self._train_text)
        memory = getattr(self.trainer.lightning_module, "memory", None)
        return self._loader(
            self._train_text,
            limit=self.trainer.limit_train_batches,
            memory=memory if isinstance(memory, Memory) else None,
        )

    @override
    def val_dataloader(self) -> SegmentLoader:  # type: ignore[override]
        return self._loader(self._val_text, max_segments=self.max_val_segments)

    @override
    def test_dataloader(self) -> SegmentLoader:  # type: ignore[override]
        return self._loader(self._val_text)

    @override
    def predict_dataloader(self) -> SegmentLoader:  # type: ignore[override]
        return self._loader(self._val_text)

    def _loader(self, text: Tensor | None, **options: Any) -> SegmentLoader:
        return SegmentLoader(
            self._windows(text),
            self.batch_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=world_size(self),
            **options,
        )
