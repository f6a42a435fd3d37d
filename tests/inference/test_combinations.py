"""Options of offloading together: each pair gives the right results, or is refused at set-up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inference.offload_models import D_MODEL, KINDS, Blocks, poisoned

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
