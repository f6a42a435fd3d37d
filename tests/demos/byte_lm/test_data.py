"""The corpus: what is read, how it is split, and where a resumed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fastmoe.demos.byte_lm.data import (
    ByteCorpus,
    ByteWindows,
    find_files,
    read_files,
    split_files,
)
from lightning_fastmoe.demos.loaders import ResumableLoader
from lightning_fastmoe.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        file = tmp_path / f"pkg{i % 4}" / f"module{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"value = {i}\n" * 20)
    (tmp_path / "pkg0" / "binary.so").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "pkg0" / "empty.py").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "module.txt").write_text("cached")
    return tmp_path


def test_finds_text_alone(folder: Path) -> None:
    root, files = find_files(folder)
    assert root == folder
    assert len(files) == 40
    assert files == sorted(files)
    assert {file.suffix for file in files} == {".py"}


def test_default_corpus_is_the_standard_library_without_tests() -> None:
    root, files = find_files()
    names = {file.relative_to(root).as_posix() for file in files}
    assert {"argparse.py", "json/decoder.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "__pycache__"})


def test_split_covers_all_files_once(folder: Path) -> None:
    root, files = find_files(folder)
    train, val = split_files(root, files, 0.25)
    assert set(train).isdisjoint(val)
    assert set(train) | set(val) == set(files)
    assert 4 <= len(val) <= 16


def test_split_depends_on_names_alone(folder: Path) -> None:
    root, files = find_files(folder)
    train, val = split_files(root, files, 0.25)
    assert split_files(root, files[::-1], 0.25) == (train, val)
    # The others stay on their side when one file goes away.
    fewer_train, fewer_val = split_files(root, [f for f in files if f != train[0]], 0.25)
    assert fewer_val == val
    assert fewer_train == train[1:]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_of_the_split_has_a_file(folder: Path, fraction: float) -> None:
    root, files = find_files(folder)
    train, val = split_files(root, files[:2], fraction)
    assert (len(train), len(val)) == (1, 1)


def test_files_are_separated_and_cut(folder: Path) -> None:
    _, files = find_files(folder)
    text = bytes(read_files(files[:2]).tolist())
    assert text == b"\0" + files[0].read_bytes() + b"\0" + files[1].read_bytes()
    assert bytes(read_files(files[:2], max_bytes=30).tolist()) == text[:30]


def test_windows_predict_every_byte_once() -> None:
    text = torch.arange(31, dtype=torch.uint8)
    windows = ByteWindows(text, seq_len=10)
    assert len(windows) == 3
    assert torch.cat([windows[i][1:] for i in range(3)]).tolist() == list(range(1, 31))
    assert [windows[i][0].item() for i in range(3)] == [0, 10, 20]


def test_kept_windows_are_spread_over_the_text() -> None:
    windows = ByteWindows(torch.arange(101, dtype=torch.uint8), seq_len=10, max_windows=4)
    assert [windows[i][0].item() for i in range(len(windows))] == [0, 20, 50, 70]
    with pytest.raises(IndexError):
        windows[4]


def test_single_file_is_split_by_position(tmp_path: Path) -> None:
    content = bytes(range(1, 201))
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    corpus = ByteCorpus(str(file), seq_len=9, batch_size=2, val_fraction=0.25)
    corpus.setup()
    train = corpus.train_dataloader().dataset
    val = corpus.val_dataloader().dataset
    assert bytes(train.text.tolist()) == content[:150]
    assert bytes(val.text.tolist()) == content[150:]


def test_test_data_is_all_of_the_validation_text(folder: Path) -> None:
    corpus = ByteCorpus(str(folder), seq_len=8, batch_size=2, max_val_windows=3)
    corpus.setup()
    assert len(corpus.val_dataloader().dataset) == 3
    assert len(corpus.test_dataloader().dataset) > 3


def test_missing_path_names_path_rule_and_fix(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="does not exist") as caught:
        ByteCorpus(missing)
    message = str(caught.value)
    assert missing in message
    assert "file or a folder" in message
    assert "leave it out" in message


@pytest.mark.parametrize("content", [None, b"", b"\0binary"])
def test_corpus_without_text_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(DataError, match="has no text") as caught:
        ByteCorpus(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_corpus_smaller_than_a_batch_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"training text.*need 1000001"):
        ByteCorpus(str(folder), seq_len=10_000, batch_size=100).setup()


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("batch_size", -1), ("max_bytes", 0), ("val_fraction", 1.0)]
)
def test_impossible_sizes_are_errors(folder: Path, name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"data.{name} is {value}"):
        ByteCorpus(str(folder), **{name: value})


def _loader(num_replicas: int, rank: int, batch_size: int = 2) -> ResumableLoader:
    windows = ByteWindows(torch.arange(97, dtype=torch.uint8), seq_len=4)
    return ResumableLoader(windows, batch_size, num_replicas, rank, seed=3, num_workers=0)


def _starts(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].tolist()


def test_ranks_share_the_data_without_overlap() -> None:
    first, second = (_starts(list(_loader(2, rank))) for rank in (0, 1))
    assert sorted(first + second) == list(range(0, 96, 4))
    assert first != sorted(first)


@pytest.mark.parametrize("new_ranks", [1, 2, 4])
def test_resumed_epoch_has_the_remaining_data_alone(new_ranks: int) -> None:
    seen: list[int] = []
    for rank in (0, 1):
        loader = _loader(2, rank)
        iterator = iter(loader)
        seen += _starts([next(iterator), next(iterator)])
        state = loader.state_dict()
    rest: list[int] = []
    for rank in range(new_ranks):
        loader = _loader(new_ranks, rank)
        loader.load_state_dict(state)
        rest += _starts(list(loader))
    assert sorted(seen + rest) == list(range(0, 96, 4))


def test_pass_after_a_resumed_one_is_complete() -> None:
    loader = _loader(1, 0)
    loader.load_state_dict({"samples": 6})
    assert [len(list(loader)), len(list(loader))] == [9, 12]


def test_position_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    loader = _loader(1, 0)
    list(loader)
    assert loader.state_dict() == {"samples": 0}
