"""Chunks of sequences and keys and values on the host, on a GPU: whenever a copy comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_fastmoe.huggingface import HostCache, causal_lm_loss
from lightning_fastmoe.inference import offload_experts

LAYERS, PROMPT, NEW = 3, 40, 6
IDS = torch.randint(3, 500, (7, PROMPT), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
for number in range(7):
    MASK[number, : 3 * number] = 0


def build(attention: str = "eager") -> Any:
    """A model on the CPU; eager attention gives the same bits each time."""
    torch.manual_seed(4)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        experts_implementation="fastmoe",
    )
    return model.eval().requires_grad_(False)


def late(stream: Any, cycles: int) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def disturb_experts(offloaded: Any, cycles: int) -> None:
    """Slots are poisoned when they are released, and each copy begins late."""
    ring = offloaded._ring
    copying = ring._copy

    def copy(layer: int, slot: Any) -> None:
        slot.memory.fill_(0xFF)
        late(ring._stream, cycles)
        copying(layer, slot)

    ring._copy = copy


def disturb_cache(cache: HostCache, cycles: int) -> None:
    """The staging buffer is poisoned, and copies both ways begin late."""
    rows: Any = cache._rows
    staging, writing = rows.stage, rows.write

    def stage(*args: Any) -> None:
        rows._buffer().fill_(0xFF)
        late(rows._streams[0], cycles)
        staging(*args)

    def write(*args: Any) -> None:
        if rows._streams:
            late(rows._streams[1], cycles)
        writing(*args)

    rows.stage, rows.write = stage, write


def hidden_states(model: Any, mask: Tensor | None) -> Tensor:
    out: Tensor = model.base_model(
        IDS.cuda(), attention_mask=None if mask is None else mask.cuda(), use_cache=False
    ).last_hidden_state
    return out


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_bits_of_a_resident_model_in_chunks(size: int, cycles: int) -> None:
    """And, but for kernels that depend on how many rows there are, of one without chunks."""
    model = build()
    resident = {"resident_layers": LAYERS}
    with torch.inference_mode():
        offloaded = offload_experts(model, "cuda", **resident)
        whole = [hidden_states(model, mask) for mask in (None, MASK)]
        offloaded.close()
        offloaded = offload_experts(model, "cuda", **resident, chunk_sequences=size)
        right = [hidden_states(model, mask) for mask in (None, MASK)]
        offloaded.close()
        offloaded = offload_experts(model, "cuda", chunk_sequences=size)
        disturb_experts(offloaded, cycles)
        before = offloaded.statistics.copied
        for _ in range(2):
            found = [hidden_states(model, mask) for mask in (None, MASK)]
            for one, chunked, unchunked in zip(found, right, whole, strict=True):
                assert torch.equal(one, chunked)
                error = (one.float() - unchunked.float()).norm() / unchunked.float().norm()
                assert error < 0.02
        each = sum(stack.slot_bytes for stack in offloaded._ring._stacks)  # type: ignore[union-attr]
        assert offloaded.statistics.copied - before == 4 * each
    assert offloaded.statistics.misses == 0
    offloaded.close()


@pytest.mark.parametrize("cycles", [0, 1_000_000])
@pytest.mark.parametrize("size", [None, 2, 3])
def test_the_bits_of_the_ordinary_cache(size: int | None, cycles: int) -> None:
    model = build()
    options: Any = {
        "attention_mask": MASK.cuda(),
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    offloaded = offload_experts(model, "cuda", chunk_sequences=size)
    right = model.generate(IDS.cuda(), **options)
    cache = HostCache(model.config, max_length=PROMPT + NEW)
    disturb_cache(cache, cycles)
    found = model.generate(IDS.cuda(), past_key_values=cache, **options)
    assert torch.equal(found.sequences, right.sequences)
    for a, b in zip(found.logits, right.logits, strict=True):
        assert torch.equal(a, b)
    assert cache.statistics.misses == 0
    offloaded.close()


def test_memory_of_the_cache_is_registered_and_let_go() -> None:
    model = build()
    offloaded = offload_experts(model, "cuda", chunk_sequences=4)
    cache = HostCache(model.config, max_length=4096)
    ids = IDS.cuda()
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    held = [one.keys for one in cache._rows._held.values()]
    assert all(keys.is_pinned() for keys in held)
    assert cache.staging_bytes <= cache.host_bytes * 4 / 7 / LAYERS + 1024
    del cache
    assert not any(keys.is_pinned() for keys in held)
    offloaded.close()


def test_peak_memory_falls() -> None:
    """By the activations of all sequences but those of a chunk."""
    model = build("sdpa")
    ids = torch.randint(3, 500, (128, 256), device="cuda")
    peaks = []
    for size in (None, 8):
        offloaded = offload_experts(model, "cuda", chunk_sequences=size)
        with torch.inference_mode():
            causal_lm_loss(model, ids, input_ids=ids)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            causal_lm_loss(model, ids, input_ids=ids)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        offloaded.close()
    hidden = ids.numel() * 256 * 2
    assert peaks[1] < 6 * hidden
    assert peaks[1] < 0.5 * peaks[0]


def test_the_cache_takes_no_memory_of_the_gpu() -> None:
    """Of 64 sequences in chunks of 4, a sixteenth of a layer, twice or thrice."""
    model = build()
    ids = torch.randint(3, 500, (64, 512), device="cuda")
    offloaded = offload_experts(model, "cuda", chunk_sequences=4)
    peaks, size = [], 0
    for on_host in (True, False, True):  # the first pass, which takes what stays, doesn't count
        cache = HostCache(model.config, max_length=513) if on_host else None
        with torch.inference_mode():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            kept = model(ids[:, :512], past_key_values=cache, logits_to_keep=1).past_key_values
            torch.cuda.synchronize()
            peaks.append(torch.cuda.memory_allocated() - before)
            size = cache.host_bytes if cache is not None else 0
            del kept, cache
    assert peaks[1] >= 0.99 * size
    assert peaks[2] <= size / LAYERS / 16 + (4 << 20)
    offloaded.close()
