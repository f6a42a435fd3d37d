"""Keys and values in host memory, against transformers' own cache with the same chunks."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import HostCache
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.host_rows import _Held

PROMPT, NEW = 9, 5
IDS = torch.randint(3, 60, (5, PROMPT), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = MASK[3, :7] = 0


def poisoned(cache: HostCache) -> None:
    """Fills the staging buffer with NaN before each copy."""
    rows = cache._rows
    staging = rows.stage

    def stage(*args: Any) -> None:
        rows._buffer().fill_(0xFF)
        staging(*args)

    rows.stage = stage  # type: ignore[method-assign]


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("size", [None, 2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_bits_of_the_ordinary_cache(name: str, size: int | None, sampled: bool) -> None:
    """gpt_oss has layers with a window of 8, and the latent attention no values of that width."""
    model = make_model(Run(name)).eval()
    options = {"do_sample": sampled, "top_k": 5, "temperature": 3.0} if sampled else {}
    whole = generate(model.double(), **options).sequences
    model.float()
    offloaded = offload_experts(model, "cpu", slots=1, chunk_sequences=size)
    right = generate(model, **options)
    cache = HostCache(model.config, max_length=PROMPT + NEW)
    poisoned(cache)
    copied = offloaded.statistics.copied
    found = generate(model, past_key_values=cache, **options)
    assert torch.equal(found.sequences, right.sequences)
    for a, b in zip(found.logits, right.logits, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.sequences, whole)
    assert cache.statistics.misses == 0
    if len(offloaded._layers) > 1:
        each = sum(stack.slot_bytes for stack in offloaded._ring._stacks)  # type: ignore[union-attr]
        assert offloaded.statistics.copied - copied == NEW * each
    for number in range(len(cache.layers)):
        sizes = right.past_key_values.get_mask_sizes(1, number)
        assert cache.get_mask_sizes(1, number) == sizes
    held = [(layer.keys, layer.values) for layer in right.past_key_values.layers]
    number = sum(t.numel() * t.element_size() // t.shape[-2] for pair in held for t in pair)
    assert cache.host_bytes == number * (PROMPT + NEW)
    assert cache.statistics.written == number * (PROMPT + NEW - 1)
    chunks = 1 if size is None else -(-5 // size)
    largest = (size or 5) / 5 * cache.host_bytes / len(held)
    assert cache.staging_bytes <= largest + 512
    assert len(cache._rows._held) == chunks * len(held)


@pytest.mark.parametrize("size", [2, "auto"])
def test_each_chunk_of_each_layer_is_copied_once_per_step(
    size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps have the chunks of the prompt, also if those were chosen by its length."""
    monkeypatch.setattr("lightning_fastmoe.inference.chunks.AUTO_TOKENS", 3 * PROMPT - 1)
    model = make_model(Run("qwen3_moe")).eval()
    offload_experts(model, "cpu", chunk_sequences=size)
    cache = HostCache(model.config, max_length=PROMPT + NEW)
    generate(model, past_key_values=cache)
    assert cache.chunk_rows == 2
    a_position = cache.host_bytes // (PROMPT + NEW)
    positions = sum(range(PROMPT, PROMPT + NEW - 1))
    ahead = a_position * (PROMPT + NEW - 1) * 2 // 5 // 2  # of the step that doesn't come
    assert cache.statistics.copied == a_position * positions + ahead


def test_batches_of_one_and_longer_continuations() -> None:
    model = make_model(Run("gpt_oss")).eval()
    parts = [IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]]
    for rows in (1, 5):
        with torch.inference_mode():
            right = model(IDS[:rows]).logits
            offloaded = offload_experts(model, "cpu", chunk_sequences=2)
            cache = HostCache(model.config, max_length=PROMPT)
            for _ in range(2):
                found = [model(ids[:rows], past_key_values=cache).logits for ids in parts]
                torch.testing.assert_close(torch.cat(found, 1), right, rtol=0, atol=1e-5)
                assert cache.get_seq_length() == PROMPT
                cache.reset()
            offloaded.close()


def test_a_reset_cache_serves_other_batches() -> None:
    """The same memory where it fits, as for full batches before a smaller one."""
    model = make_model(Run("qwen3_moe")).eval()
    offload_experts(model, "cpu", chunk_sequences=2)
    cache = HostCache(model.config, max_length=PROMPT)
    with torch.inference_mode():
        for rows, kept in ((5, None), (5, True), (3, False), (5, False)):
            before = {key: held.keys.data_ptr() for key, held in cache._rows._held.items()}
            right = model(IDS[:rows], use_cache=False).logits
            for ids in (IDS[:rows, :6], IDS[:rows, 6:]):
                found = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(found, right[:, 6:], rtol=0, atol=1e-5)
            after = {key: held.keys.data_ptr() for key, held in cache._rows._held.items()}
            assert kept is None or (before == after) == kept
            cache.reset()


class Late:
    """A stream whose copies happen when something waits for them, and not before."""

    device = torch.device("cpu")
    active: Late | None = None

    def __init__(self) -> None:
        self.work: list[Any] = []
        self.done = 0

    def __enter__(self) -> None:
        Late.active = self

    def __exit__(self, *_: Any) -> None:
        Late.active = None

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def wait_stream(self, other: Any) -> None:
        assert other == "main"  # which is never late

    def synchronize(self) -> None:
        self.run(len(self.work))


class LateEvent:
    """An event of such a stream."""

    def record(self, stream: Late | None = None) -> None:
        where = stream or Late.active
        assert where is not None
        self.stream, self.number = where, len(where.work)

    def wait(self, stream: Any) -> None:
        if isinstance(stream, Late):
            stream.work.append(lambda: self.stream.run(self.number))
        else:
            self.stream.run(self.number)


@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [("qwen3_moe", 2, None), ("qwen3_moe", 1, None), ("qwen3_moe", 1, 2), ("gpt_oss", 2, 2)],
)
def test_copies_as_late_as_they_may_be(
    name: str, layers: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(Run(name), num_hidden_layers=layers).eval()
    offload_experts(model, "cpu", chunk_sequences=size)
    right = generate(model)
    cache = HostCache(model.config, max_length=PROMPT + NEW)
    cache._rows._streams += [Late(), Late()]
    copy = Tensor.copy_

    def late(own: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if Late.active is None:
            return copy(own, other, *args, **kwargs)
        Late.active.work.append(lambda: copy(own, other))
        return own

    monkeypatch.setattr(Tensor, "copy_", late)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    poisoned(cache)
    found = generate(model, past_key_values=cache)
    assert all(stream.done for stream in cache._rows._streams)
    assert torch.equal(found.sequences, right.sequences)
    for a, b in zip(found.logits, right.logits, strict=True):
        assert torch.equal(a, b)


def test_without_chunks_and_offloaded_experts() -> None:
    model = make_model(Run("mixtral")).eval()
    right = generate(model)
    found = generate(model, past_key_values=HostCache(model.config, max_length=PROMPT + NEW))
    assert torch.equal(found.sequences, right.sequences)
    for a, b in zip(found.logits, right.logits, strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    model = make_model(Run("qwen3_moe")).eval()
    offload_experts(model, "cpu", chunk_sequences=2)
    cache = HostCache(model.config, max_length=PROMPT + 1)
    with torch.inference_mode():
        with pytest.raises(ConfigError, match="has 11 positions, and HostCache has room for max"):
            generate(model, past_key_values=cache)
        with pytest.raises(ConfigError, match="A pass with this HostCache has failed"):
            model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        model(IDS, past_key_values=cache)
        with pytest.raises(ConfigError, match=r"in chunks \[\(0, 2\), \(2, 4\), \(4, 5\)\], and a"):
            model(IDS[:3, :1], past_key_values=cache)
    with pytest.raises(ConfigError, match="HostCache can't be reordered, which beam"):
        generate(model, past_key_values=HostCache(model.config, PROMPT + NEW), num_beams=2)
    with pytest.raises(ConfigError, match="can't drop positions"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="max_length=0 must be positive"):
        HostCache(model.config, 0)
    other = make_model(Run("nemotron_h"))
    with pytest.raises(ConfigError, match="HostCache knows keys and values of full or sliding"):
        HostCache(other.config, 5)


def test_registered_memory_is_let_go() -> None:
    """After the copies under way, and before it is freed."""
    events: list[str] = []
    cache = HostCache(make_model(Run("mixtral")).config, max_length=4)
    stream = SimpleNamespace(synchronize=lambda: events.append("waited"))
    pinned: Any = SimpleNamespace(close=lambda: events.append("closed"))
    cache._rows._streams.append(stream)
    cache._rows._held[0, 0] = _Held(torch.ones(2), torch.ones(2), pinned)
    del cache
    gc.collect()
    assert events == ["waited", "closed"]
