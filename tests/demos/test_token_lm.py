"""Token files in training: windows, documents, what is refused, and resuming within an epoch."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_fastmoe.demos.byte_lm.model import MoELanguageModel
from lightning_fastmoe.demos.token_lm import TokenFiles, TokenLM
from lightning_fastmoe.demos.token_lm.format import read_manifest
from lightning_fastmoe.demos.token_lm.windows import TokenWindows
from lightning_fastmoe.errors import ConfigError, DataError
from lightning_fastmoe.huggingface import MoECausalLM
from lightning_fastmoe.huggingface.batch import read_batch
from lightning_fastmoe.inference.chunks import ChunkedBlocks

EOS = 0
VOCAB = 50


def stream(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Documents of 1 to 12 tokens and their ends."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < length:
        ids += [*rng.integers(1, VOCAB, rng.integers(1, 13)).tolist(), EOS]
    return np.array([*ids[: length - 1], EOS])


def write(folder: Path, train: Iterable[int], val: Iterable[int] = (), **changes: Any) -> Path:
    """Token files as `lightning-fastmoe tokenize` writes them; ``changes`` go to tokens.json."""
    content: dict[str, Any] = {
        "version": 1,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "eos": "<|endoftext|>",
        "eos_id": EOS,
        "tokenizer_sha256": "0" * 64,
        "splits": {},
    }
    content.update(changes)
    folder.mkdir(exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        array = np.array(list(ids), np.dtype(content["dtype"]).newbyteorder("<"))
        array.tofile(folder / f"{name}.bin")
        documents = int((array == EOS).sum())
        content["splits"][name] = {"tokens": len(array), "documents": documents}
    (folder / "tokens.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data", stream(965), stream(161, seed=1))


def windows_of(folder: Path, seq_len: int, **options: Any) -> TokenWindows:
    return TokenWindows(folder, read_manifest(folder), "train", seq_len, **options)


def test_windows_cover_the_stream(folder: Path) -> None:
    windows = windows_of(folder, 12)
    rows = [windows[i]["input_ids"] for i in range(len(windows))]
    assert {(row.dtype, row.shape) for row in rows} == {(torch.int64, (13,))}
    assert len(rows) == 80  # 964 = 80 * 12 + 4
    expected = stream(965)
    assert torch.cat([rows[0][:1], *(row[1:] for row in rows)]).tolist() == expected[:961].tolist()
    assert all(a[-1] == b[0] for a, b in zip(rows, rows[1:], strict=False))


@pytest.mark.parametrize("ids", [[40_000, 65_535, 0], [65_536, 100_000, 0]])
def test_large_ids_stay_as_they_are(tmp_path: Path, ids: list[int]) -> None:
    large = max(ids) > 65_535
    path = write(
        tmp_path, ids, dtype="uint32" if large else "uint16", vocab_size=2**17 if large else 2**16
    )
    assert windows_of(path, 2)[0]["input_ids"].tolist() == ids


def test_positions_restart_with_each_document(tmp_path: Path) -> None:
    path = write(tmp_path, [5, 6, EOS, 7, EOS, 8, 9, 10, 11, EOS, 3])
    windows = windows_of(path, 5)
    assert windows[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 0]
    # It begins within a document, and position 0 is the first that it sees.
    assert windows[1]["input_ids"].tolist() == [8, 9, 10, 11, EOS, 3]
    assert windows[1]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0]


def test_windows_are_one_text_on_request(folder: Path) -> None:
    assert set(windows_of(folder, 12, separate_documents=False)[3]) == {"input_ids"}


def test_windows_are_sent_to_workers_without_the_data(folder: Path) -> None:
    windows = windows_of(folder, 12)
    expected = windows[5]["input_ids"]  # maps the file
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[5]["input_ids"], expected)  # noqa: S301 - our own


def tiny(**arguments: Any) -> TokenLM:
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ffn": 8, "num_experts": 4}
    return TokenLM(**{**sizes, "init_std": 0.2, "warmup_steps": 2, "lr": 1e-2, **arguments})


def test_packed_documents_equal_separate_ones(tmp_path: Path) -> None:
    documents = [[5, 6, EOS], [7, EOS], [8, 9, 10, 11, EOS]]
    path = write(tmp_path, sum(documents, []))
    batch = {name: x[None] for name, x in windows_of(path, 9)[0].items()}
    pl.seed_everything(0)
    model = tiny(vocab_size=VOCAB)
    model.configure_model()
    alone = torch.cat([model(torch.tensor([document]))[0] for document in documents])
    torch.testing.assert_close(model(batch)[0], alone)
    merged = model(batch["input_ids"])[0]
    assert (merged[5:] - alone[5:]).abs().max() > 1e-2


@pytest.mark.parametrize("chunked", [False, True])
def test_chunks_need_no_mask_of_all_sequences(tmp_path: Path, chunked: bool) -> None:
    """It would be larger than what chunks save."""
    data = TokenFiles(str(write(tmp_path / "t", stream(400))), seq_len=15, batch_size=6)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = tiny(vocab_size=VOCAB)
    model.configure_model()
    model.eval()
    expected = float(model._loss(read_batch(batch)).detach())
    if chunked:
        ChunkedBlocks(model, 2, nullcontext)
    read = read_batch(batch)
    assert read.layout is not None
    assert read.layout.crossing
    assert float(model._loss(read).detach()) == pytest.approx(expected, rel=1e-6)
    assert len(read.layout._mask) == (not chunked)
    assert [len(part._mask) for part in read.layout._parts.values()] == [1, 1, 1] * chunked


def loader(folder: Path, world: int, rank: int, **options: Any) -> Any:
    files = TokenFiles(str(folder), **{"seq_len": 12, "batch_size": 2, "seed": 3, **options})
    module = tiny(vocab_size=VOCAB)
    files.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world, global_rank=rank, lightning_module=module
    )
    files.setup("fit")
    return files.train_dataloader()


def rows(batches: Iterable[dict[str, Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def test_each_epoch_has_all_windows_in_another_order(folder: Path) -> None:
    data = loader(folder, 1, 0)
    first = rows(data)
    data.sampler.set_epoch(1)
    second = rows(data)
    stored = [tuple(windows_of(folder, 12)[i]["input_ids"].tolist()) for i in range(80)]
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second
    assert stored not in (first, second)
    assert rows(loader(folder, 1, 0)) == first
    assert rows(loader(folder, 1, 0, seed=4)) != first


def test_ranks_share_the_windows(folder: Path) -> None:
    parts = [rows(loader(folder, 2, rank)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(rows(loader(folder, 1, 0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_has_the_same_batches(folder: Path, workers: int) -> None:
    uninterrupted = rows(loader(folder, 1, 0))
    data = loader(folder, 1, 0, num_workers=workers)
    iterator = iter(data)
    done = [next(iterator) for _ in range(6)]
    state = data.state_dict()
    assert rows([*done, *iterator]) == uninterrupted
    del data, iterator
    gc.collect()  # ends the workers: those of two loaders at once take torch 10 s to end
    resumed = loader(folder, 1, 0, num_workers=workers)
    resumed.load_state_dict(state)
    assert rows(resumed) == uninterrupted[12:]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_resumed_epoch_on_other_ranks(folder: Path, before: int, after: int) -> None:
    """Steps of 4 windows over all ranks see the windows of one rank's steps."""
    whole = rows(loader(folder, 1, 0, batch_size=4))
    done, resumed = [], []
    for rank in range(before):
        data = loader(folder, before, rank, batch_size=4 // before)
        done.append([rows([batch]) for batch in islice(data, 6)])
        state = data.state_dict()
    for rank in range(after):
        data = loader(folder, after, rank, batch_size=4 // after)
        data.load_state_dict(state)
        resumed.append([rows([batch]) for batch in data])
    steps = [sorted(sum(parts, [])) for parts in zip(*done, strict=True)]
    steps += [sorted(sum(parts, [])) for parts in zip(*resumed, strict=True)]
    assert steps == [sorted(whole[i : i + 4]) for i in range(0, 80, 4)]


def test_validation_takes_windows_evenly_spaced(folder: Path) -> None:
    files = TokenFiles(str(folder), seq_len=16, batch_size=2, max_val_windows=5)
    files.setup("fit")
    ids = stream(161, seed=1)
    expected = [tuple(ids[16 * i : 16 * i + 17]) for i in (0, 2, 4, 6, 8)]
    assert rows(files.val_dataloader()) == expected
    assert len(rows(files.test_dataloader())) == 10


def test_data_without_validation(tmp_path: Path) -> None:
    files = TokenFiles(str(write(tmp_path, stream(965))), seq_len=12, batch_size=2)
    files.setup("fit")
    assert files.val_dataloader() == []
    with pytest.raises(DataError, match=r"val.bin of .* has 0 tokens"):
        files.setup("test")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, "has version 2; this package reads version 1"),
        ({"dtype": "int8x"}, "dtype 'int8x' for 50 tokens"),
        ({"vocab_size": 65_537}, "dtype 'uint16' for 65537 tokens"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"eos_id": 50}, "eos_id 50 of 50 tokens"),
        ({"splits": {"train": {"tokens": 1, "documents": 1}}}, "KeyError: 'val'"),
        ({"splits": []}, "is damaged"),
    ],
)
def test_contradicting_descriptions_are_refused(
    folder: Path, changes: dict[str, Any], expected: str
) -> None:
    file = folder / "tokens.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(DataError) as caught:
        TokenFiles(str(folder))
    assert expected in str(caught.value)
    assert "okenize again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"dtype": "uint16"}', b"\xff", b"[" * 100_000])
def test_damaged_descriptions_are_refused(folder: Path, content: bytes) -> None:
    (folder / "tokens.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens.json is damaged"):
        TokenFiles(str(folder))


def test_wrong_paths_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' is not a folder.*lightning-fastmoe tokenize"):
        TokenFiles(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no tokens.json"):
        TokenFiles(str(tmp_path))
    (folder / "val.bin").unlink()
    with pytest.raises(DataError, match="val.bin can't be read: No such file"):
        TokenFiles(str(folder))


@pytest.mark.parametrize("size", [0, 1928, 1929, 1932])
def test_truncated_files_are_refused(folder: Path, size: int) -> None:
    file = folder / "train.bin"
    file.write_bytes((file.read_bytes() * 2)[:size])
    with pytest.raises(DataError, match=rf"train.bin has {size} bytes, but tokens.json says 1930"):
        TokenFiles(str(folder))


def test_too_little_text_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train.bin of .* has 965 tokens; 12 window.* need 1213"):
        loader(folder, 2, 0, batch_size=6, seq_len=101)


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("batch_size", -1), ("max_val_windows", 0)]
)
def test_impossible_sizes_are_refused(folder: Path, name: str, value: int) -> None:
    with pytest.raises(DataError, match=f"data.{name} is {value}; it must be 1 or more"):
        TokenFiles(str(folder), **{name: value})


def test_negative_workers_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="data.num_workers is -1; it must be 0 or more"):
        TokenFiles(str(folder), num_workers=-1)


@pytest.mark.parametrize("kind", ["TokenLM", "MoECausalLM"])
def test_vocabulary_must_fit_the_model(folder: Path, kind: str) -> None:
    def fits(size: int) -> None:
        files = TokenFiles(str(folder), seq_len=12, batch_size=2)
        model: pl.LightningModule = tiny(vocab_size=size)
        if kind == "MoECausalLM":
            model = MoECausalLM(config={"model_type": "mixtral", "vocab_size": size})
        files.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=1, global_rank=0, lightning_module=model
        )
        files.setup("fit")

    fits(VOCAB)
    with pytest.raises(ConfigError, match="vocabulary of 50, the model one of 49"):
        fits(VOCAB - 1)


def test_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.vocab_size is not given"):
        tiny().configure_model()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"d_model": 18, "num_heads": 4}, "d_model is 18 and model.num_heads is 4"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; it must divide model.num_heads, 2"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        tiny(**sizes)


class Losses(pl.Callback):
    """Records the loss of each step, and dies before step ``dies_at``."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.dies_at = dies_at

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.dies_at:
            raise RuntimeError("power cut")

    def on_train_batch_end(self, trainer: pl.Trainer, _: Any, outputs: Any, *__: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])


def fit(folder: Path, root: Path, losses: Losses, ckpt_path: str | None = None) -> TokenLM:
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, ModelCheckpoint(root, save_last=True, every_n_train_steps=3)],
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    model = tiny()
    data = TokenFiles(str(folder), seq_len=12, batch_size=4, max_val_windows=4, num_workers=1)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_has_the_losses_of_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole, cut, resumed = Losses(), Losses(dies_at=4), Losses()
    expected = fit(folder, tmp_path / "whole", whole)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(folder, tmp_path / "cut", cut)
    found = fit(folder, tmp_path / "cut", resumed, str(tmp_path / "cut" / "last.ckpt"))
    assert list(whole.losses) == [1, 2, 3, 4, 5, 6]
    assert list(resumed.losses) == [4, 5, 6]
    assert cut.losses | resumed.losses == whole.losses
    assert len(set(whole.losses.values())) == 6
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert expected.vocab_size == 64
    # What a checkpoint says is enough to build the model again.
    loaded = TokenLM.load_from_checkpoint(tmp_path / "cut" / "last.ckpt")
    assert (loaded.vocab_size, loaded.architecture) == (64, expected.architecture)
    # And an exported model knows where to stop.
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert (saved["config"]["vocab_size"], saved["config"]["eos_token_id"]) == (64, EOS)


def test_transformers_reads_the_config() -> None:
    """It ignores fields that it does not know, so misspelt ones would go unnoticed."""
    model = tiny(vocab_size=VOCAB, num_kv_heads=1, rope_theta=500.0)
    config = transformers.AutoConfig.for_model(**model.config)
    assert config.rope_parameters["rope_theta"] == 500.0
    assert (config.head_dim, config.num_key_value_heads, config.norm_topk_prob) == (8, 1, True)


@pytest.mark.parametrize(
    ("wanted", "graphs"), [(None, False), (None, True), (True, False), (True, True), (False, False)]
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_blocks_are_compiled_on_cuda_or_as_asked(
    device: str, wanted: bool | None, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, str]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **mode: compiled.append(mode))
    strategy = SimpleNamespace(root_device=torch.device(device))
    for model in (
        TokenLM(
            8, 2, 2, num_experts=2, d_ffn=4, vocab_size=VOCAB, compile=wanted, cuda_graphs=graphs
        ),
        MoELanguageModel(8, 2, 2, 4, num_experts=2, compile=wanted, cuda_graphs=graphs),
    ):
        compiled.clear()
        model._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        model.configure_model()
        mode = {"mode": "reduce-overhead"} if graphs else {}
        assert compiled == [mode] * (2 if wanted or (wanted is None and device == "cuda") else 0)
        model._trainer = None


def test_cuda_graphs_of_blocks_that_are_not_compiled_are_refused() -> None:
    sizes = {"num_experts": 2, "d_ffn": 4}
    for make in (
        lambda **options: TokenLM(8, 2, 2, **sizes, vocab_size=VOCAB, compile=False, **options),
        lambda **options: MoELanguageModel(8, 2, 2, **sizes, compile=False, **options),
        lambda **options: MoECausalLM(config=tiny(vocab_size=VOCAB).config, **options),
    ):
        make()
        with pytest.raises(ConfigError, match="cuda_graphs=True has no effect without compile"):
            make(cuda_graphs=True)


def test_compiled_blocks_are_traced_once_for_packed_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch has documents of other lengths; losses are those of plain blocks."""
    graphs = []

    def counting(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: plain(block, backend=counting))
    data = TokenFiles(str(write(tmp_path / "t", stream(400))), seq_len=15, batch_size=4)
    data.setup("fit")
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TokenLM(
            16, 2, 2, num_experts=4, top_k=2, d_ffn=8, vocab_size=VOCAB, compile=compiled
        )
        model.configure_model()
        batches = [read_batch(batch) for batch in islice(data.train_dataloader(), 3)]
        losses.append([float(model._loss(batch).detach()) for batch in batches])
        # One graph of a whole block, for both.
        assert len(graphs) == compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
