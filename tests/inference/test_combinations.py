"""Options of offloading together: each pair gives the right results, or is refused at set-up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import (
    D_MODEL,
    KINDS,
    Blocks,
    Chunkable,
    InChunks,
    Scorer,
    poisoned,
    trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import quantize_experts
from lightning_fastmoe.inference import compression_error, offload_experts
from lightning_fastmoe.inference.pass_timer import PassTimer


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"expert_cache": "1MB"},
            "compression='int4' decompresses whole layers.*expert_cache='1MB'",
        ),
        ({"groups": 2}, "compression='int4' decompresses.*groups=2 divides them"),
    ],
)
def test_compressed_layers_are_whole(options: dict[str, Any], reason: str) -> None:
    model = Blocks(KINDS["softmax"])
    with pytest.raises(ConfigError, match=reason):
        offload_experts(model, "cpu", compression="int4", **options)
    with pytest.raises(ConfigError, match=reason):
        OffloadStrategy(compression="int4", **options)
    offload_experts(model, "cpu").close()  # nothing has happened to it


def test_the_error_of_compression_by_few_tokens() -> None:
    """Experts that were not chosen are rounded, too, from whatever is in their places."""
    model = Blocks(KINDS["softmax"]).eval()
    batches = [torch.randn(n, D_MODEL) for n in (1, 5, 1)]
    wanted = compression_error(copy.deepcopy(model), batches, "int4")
    offloaded = offload_experts(model, "cpu", slots=1)
    poisoned(offloaded._ring)
    found = compression_error(model, batches, "int4")
    assert offloaded.statistics.expert_misses
    assert found.layers == pytest.approx(wanted.layers, rel=1e-5)
    assert found.output == pytest.approx(wanted.output, rel=1e-5)
    offloaded.close()


def test_the_error_of_compression_in_groups_is_refused() -> None:
    model = Blocks(KINDS["softmax"])
    offloaded = offload_experts(model, "cpu", groups=2)
    with pytest.raises(ConfigError, match="layers.0 are never on the GPU as a whole"):
        compression_error(model, [torch.randn(5, D_MODEL)], "int4")
    offloaded.close()


@pytest.mark.parametrize("cache", [None, "64KB"])
def test_chunks_of_few_tokens_copy_whole_layers_once(cache: str | None) -> None:
    """Passes of one sequence, which are not divided, still copy what their tokens chose alone."""
    model = Chunkable(KINDS["softmax"]).eval()
    twin = InChunks(copy.deepcopy(model), 1)
    offloaded = offload_experts(model, "cpu", slots=2, chunk_sequences=1, expert_cache=cache)
    ring: Any = offloaded.ring
    poisoned(ring)
    layer = offloaded.host_bytes // 4
    with torch.inference_mode():
        for sequences in (1, 3, 3, 1, 1, 4):  # of one token each: 2 of 4 experts, which is few
            x = torch.randn(sequences, 1, D_MODEL)
            before = copy.copy(offloaded.statistics)
            assert torch.equal(model(x), twin(x)), sequences
            copied = offloaded.statistics.copied - before.copied
            if sequences == 1:
                assert copied <= 4 * layer // 2
                assert offloaded.statistics.expert_misses > before.expert_misses or cache
            else:  # the first one after few tokens has found none copied ahead
                assert 4 * layer <= copied <= 6 * layer
                assert offloaded.statistics.expert_misses == before.expert_misses
                assert {slot.layer for slot in ring._slots} == {0, 1}  # ahead of the next pass
                assert all(slot.experts is None for slot in ring._slots)
    assert offloaded.statistics.misses == 0
    offloaded.close()


def test_chunks_of_compressed_experts() -> None:
    model = Chunkable(KINDS["softmax"]).eval()
    right = InChunks(rounded(model, "int4"), 2)  # type: ignore[arg-type]
    offloaded = offload_experts(model, "cpu", chunk_sequences=2, compression="int4")
    decompressed = []
    decompress = offloaded._compressed.decompress  # type: ignore[union-attr]

    def counted(number: int, parts: Any) -> Any:
        decompressed.append(number)
        return decompress(number, parts)

    offloaded._compressed.decompress = counted  # type: ignore[union-attr, method-assign]
    with torch.inference_mode():
        for sequences in (5, 2, 5):
            x = torch.randn(sequences, 3, D_MODEL)
            assert torch.equal(model(x), right(x))
    assert decompressed == 3 * [0, 1, 2, 3]  # once, for all chunks
    assert offloaded.statistics.misses == 0
    with pytest.warns(UserWarning, match=ROUNDED):
        offloaded.close()


def test_the_error_of_compression_in_chunks() -> None:
    model = Chunkable(KINDS["softmax"]).eval()
    batches = [torch.randn(5, 3, D_MODEL)]
    wanted = compression_error(copy.deepcopy(model), batches, "int4")
    offloaded = offload_experts(model, "cpu", chunk_sequences=2)
    found = compression_error(model, batches, "int4")
    offloaded.close()
    assert found.layers == pytest.approx(wanted.layers, rel=1e-5)
    assert found.output == pytest.approx(wanted.output, rel=1e-5)


def test_chunks_in_groups_are_refused() -> None:
    reason = "groups=2 keeps a part.*chunk_sequences=8 would copy all of them for each chunk"
    with pytest.raises(ConfigError, match=reason):
        offload_experts(Chunkable(KINDS["softmax"]), "cpu", groups=2, chunk_sequences=8)
    with pytest.raises(ConfigError, match=reason):
        OffloadStrategy(groups=2, chunk_sequences=8)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"compression": "int8"}])
@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
def test_the_report_plans_what_was_copied(options: dict[str, Any]) -> None:
    """One token chooses 2 of 4 experts of each layer, and no slot has them from before."""
    strategy = OffloadStrategy(slots=1, **options)
    own = trainer(strategy)
    copied: list[int] = []

    class Module(Scorer):
        def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
            out = super().predict_step(x, batch_idx)
            assert strategy.offloaded is not None
            copied.append(strategy.offloaded.statistics.copied)
            return out

    own.predict(Module({}), DataLoader(torch.randn(5, D_MODEL)))  # type: ignore[arg-type]
    report = strategy.last_report
    assert report is not None
    assert [one.tokens for one in report.passes] == 5 * [1]
    assert report.plan.copied == copied[-1] - copied[-2] > 0
    assert report.plan.groups == options.get("groups", 1)
    assert bool(report.plan.sizes.compressed) == ("compression" in options)
    assert report.plan.decompressing == 0  # it is in what computation took
    if "compression" not in options:
        assert report.plan.seconds == report.plan.copying + report.plan.computing


@pytest.mark.parametrize("options", [{}, {"expert_cache": "20KB"}, {"compression": "int4"}])
@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
def test_all_that_comes_from_the_host_is_timed(options: dict[str, Any]) -> None:
    model = Blocks(KINDS["softmax"]).eval()
    offloaded = offload_experts(model, "cpu", **options)
    timer = PassTimer(torch.device("cpu"))
    offloaded.time_by(timer)
    before = offloaded.statistics.copied
    with torch.inference_mode():
        for tokens in (12, 1, 1, 12, 1, 12, 0, 1):
            with timer.one_pass():
                model(torch.randn(tokens, D_MODEL))
    timer.add_up(wait=True)
    assert timer.copies.bytes == offloaded.statistics.copied - before > 0
    offloaded.close()


def packed_model() -> Any:
    """One of transformers whose experts are stored in 4 bits."""
    torch.manual_seed(3)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        experts_implementation="fastmoe",
        attn_implementation="eager",
    )
    quantize_experts(model)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"expert_cache": "100KB"}, {"groups": 3}])
def test_experts_in_4_bits(options: dict[str, Any]) -> None:
    """Made of the bytes that were copied, be it of some experts; those left out hold anything."""
    model = packed_model()
    twin = copy.deepcopy(model)
    offloaded = offload_experts(model, "cpu", slots=1, **options)
    poisoned(offloaded.ring)
    with torch.inference_mode():
        for shape in ((1, 1), (1, 20), (1, 1), (1, 2)):
            ids = torch.randint(64, shape)
            assert torch.equal(model(ids).logits, twin(ids).logits)
    assert offloaded.statistics.expert_misses
    offloaded.close()
    with pytest.raises(ConfigError, match="would make no weight of .* smaller"):
        offload_experts(model, "cpu", compression="int8")
