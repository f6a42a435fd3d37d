"""Options of offloading together: each pair gives the right results, or is refused at set-up."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import D_MODEL, KINDS, Blocks, poisoned
from torch import Tensor, nn

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import compression_error, offload_experts


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


class Chunkable(nn.Module):
    """Blocks that compute each sequence by itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(layer) for layer in Blocks(KINDS[kind]).layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    row_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def in_chunks(model: Chunkable, x: Tensor, size: int) -> Tensor:
    """The slow twin: each block computes a chunk after the other."""
    for block in model.blocks:
        x = torch.cat([block(part) for part in x.split(size)])
    return x


@pytest.mark.parametrize("cache", [None, "64KB"])
def test_chunks_of_few_tokens_copy_whole_layers_once(cache: str | None) -> None:
    """Passes of one sequence, which are not divided, still copy what their tokens chose alone."""
    model = Chunkable("softmax").eval()
    twin = copy.deepcopy(model)
    offloaded = offload_experts(model, "cpu", slots=2, chunk_sequences=1, expert_cache=cache)
    poisoned(offloaded._ring)
    layer = offloaded.host_bytes // 4
    with torch.inference_mode():
        for sequences in (1, 3, 3, 1, 1, 4):  # of one token each: 2 of 4 experts, which is few
            x = torch.randn(sequences, 1, D_MODEL)
            before = copy.copy(offloaded.statistics)
            assert torch.equal(model(x), in_chunks(twin, x, 1)), sequences
            copied = offloaded.statistics.copied - before.copied
            if sequences == 1:
                assert copied <= 4 * layer // 2
                assert offloaded.statistics.expert_misses > before.expert_misses or cache
            else:  # the first one after few tokens has found none copied ahead
                assert 4 * layer <= copied <= 6 * layer
                assert offloaded.statistics.expert_misses == before.expert_misses
    assert offloaded._ring is not None
    assert offloaded.statistics.misses == 0
    offloaded.close()


def test_chunks_of_compressed_experts() -> None:
    model = Chunkable("softmax").eval()
    right = rounded(model, "int4")
    assert isinstance(right, Chunkable)
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
            assert torch.equal(model(x), in_chunks(right, x, 2))
    assert decompressed == 3 * [0, 1, 2, 3]  # once, for all chunks
    assert offloaded.statistics.misses == 0
    with pytest.warns(UserWarning, match=ROUNDED):
        offloaded.close()


def test_the_error_of_compression_in_chunks() -> None:
    model = Chunkable("softmax").eval()
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
        offload_experts(Chunkable("softmax"), "cpu", groups=2, chunk_sequences=8)
    with pytest.raises(ConfigError, match=reason):
        OffloadStrategy(groups=2, chunk_sequences=8)
