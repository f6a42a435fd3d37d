"""Streams: what is read in which order, and where a resumed run goes on."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.demos.byte_lm.data import ByteWindows
from lightning_fastmoe.demos.transformer_xl import ByteStreams, Memory, SegmentLoader
from lightning_fastmoe.errors import DataError

SEQ_LEN, BATCH = 5, 2
TEXT = torch.arange(250, dtype=torch.uint8)
"""250 bytes: 49 segments, or 12 for each of 4 streams."""


def loader(rank: int = 0, *, seq_len: int = SEQ_LEN, **options: object) -> SegmentLoader:
    arguments = {"batch_size": BATCH, "world_size": 2, **options}
    return SegmentLoader(ByteWindows(TEXT, seq_len), rank=rank, **arguments)


def remembering(*shape: int) -> Memory:
    memory = Memory(3)
    memory.append([torch.randn(shape), torch.randn(shape)])
    return memory


def test_rows_are_streams_that_continue_from_batch_to_batch() -> None:
    streams = []
    for rank in range(2):
        batches = list(loader(rank))
        assert len(batches) == len(loader(rank)) == 12
        assert [batch.starts for batch in batches] == [True] + [False] * 11
        for row in range(BATCH):
            inputs = torch.cat([batch.tokens[row, :-1] for batch in batches])
            targets = torch.cat([batch.tokens[row, 1:] for batch in batches])
            assert torch.equal(inputs[1:], targets[:-1])
            streams.append((inputs, targets))
    # Side by side, they are the text; each byte but the first is a target once.
    whole = 4 * 12 * SEQ_LEN
    assert torch.equal(torch.cat([inputs for inputs, _ in streams]), TEXT[:whole])
    assert torch.equal(torch.cat([targets for _, targets in streams]), TEXT[1 : whole + 1])


def test_ranks_share_the_streams_of_one_process() -> None:
    one = list(SegmentLoader(ByteWindows(TEXT, SEQ_LEN), 2 * BATCH))
    for index, batches in enumerate(zip(loader(0), loader(1), strict=True)):
        assert torch.equal(torch.cat([batch.tokens for batch in batches]), one[index].tokens)


def tokens_of(batches: list) -> list[Tensor]:
    return [batch.tokens for batch in batches]


@pytest.mark.parametrize("done", [1, 5, 11])
def test_a_resumed_loader_goes_on_with_its_memory(done: int) -> None:
    memory = remembering(BATCH, 3, 8)
    first, whole = loader(1, memory=memory), list(loader(1))
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    state = first.state_dict()
    restored = Memory(3)
    second = loader(1, memory=restored)
    second.load_state_dict(state)
    assert all(map(torch.equal, restored.layers, memory.layers))
    assert len(restored.layers) == 2
    # A save before the first batch, as a hook at the start of training may make one.
    again = second.state_dict()
    assert (again["bytes"], again["layout"]) == (state["bytes"], state["layout"])
    assert all(map(torch.equal, again["memory"]["layers"], memory.layers))
    rest = list(second)
    assert all(map(torch.equal, tokens_of(rest), tokens_of(whole[done:])))
    assert len(rest) == 12 - done
    assert not any(batch.starts for batch in rest)
    assert len(list(second)) == 12, "later passes are complete"


def test_between_epochs_nothing_is_remembered() -> None:
    memory = remembering(BATCH, 3, 8)
    read = loader(memory=memory)
    assert read.state_dict()["memory"] is None
    list(read)
    state = read.state_dict()
    assert (state["bytes"], state["memory"]) == (0, None)
    read.load_state_dict(state)
    assert memory.layers == []


@pytest.mark.parametrize(("limit", "batches"), [(4, 4), (0.5, 6), (100, 12), (1.0, 12)])
def test_an_epoch_may_end_before_the_streams(limit: float, batches: int) -> None:
    read = loader(limit=limit, memory=remembering(BATCH, 3, 8))
    iterator = iter(read)
    for done in range(1, batches + 1):
        next(iterator)
        at_end = done == batches
        assert (read.state_dict()["bytes"] == 0) == (read.state_dict()["memory"] is None) == at_end


@pytest.mark.parametrize(
    "other",
    [
        {"rank": 0},
        {"world_size": 1, "rank": 0, "batch_size": 4},
        {"batch_size": 1},
        {"seq_len": 10},
    ],
    ids=str,
)
def test_memory_of_other_streams_is_forgotten(other: dict[str, int]) -> None:
    first = loader(1, memory=remembering(BATCH, 3, 8))
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    memory = remembering(1, 1, 1)
    arguments = {"rank": 1, **other}
    second = loader(**arguments, memory=memory)
    with pytest.warns(UserWarning, match=r"'rank': 1, 'world_size': 2.* The memory starts empty"):
        second.load_state_dict(first.state_dict())
    assert memory.layers == []
    # The same share of the text has been read.
    now = {"batch_size": BATCH, "world_size": 2, "seq_len": SEQ_LEN, **other}
    skipped = 4 * (2 * BATCH * SEQ_LEN) // math.prod(now[n] for n in now if n != "rank")
    assert len(list(second)) == len(second) - skipped


def corpus(path: Path, size: int, **options: object) -> ByteStreams:
    file = path / "text"
    file.write_bytes(bytes(i % 200 + 1 for i in range(size)))
    data = ByteStreams(str(file), seq_len=10, batch_size=2, val_fraction=0.2, **options)
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=1, lightning_module=None, limit_train_batches=1.0
    )
    return data


def test_streams_of_a_corpus(tmp_path: Path) -> None:
    data = corpus(tmp_path, 2000, max_val_segments=3)
    data.setup("fit")
    assert len(data.train_dataloader()) == 1600 // 10 // 4 - 1  # one byte is no target
    assert len(data.val_dataloader()) == 3
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == 9
    first = next(iter(data.val_dataloader())).tokens
    assert first[0].tolist() == [(1600 + 2 * 9 * 10 + i) % 200 + 1 for i in range(11)]


def test_a_module_without_memory_can_be_trained(tmp_path: Path) -> None:
    data = corpus(tmp_path, 2000)
    data.setup("fit")
    loaded = data.train_dataloader()
    next(iter(loaded))
    assert loaded.state_dict()["memory"] is None


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation text .* has 40 bytes; 4 window"):
        corpus(tmp_path, 200).setup("fit")
    with pytest.raises(DataError, match="max_val_segments is 0"):
        corpus(tmp_path, 2000, max_val_segments=0)
