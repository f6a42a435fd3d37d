"""Activations counted by shapes, against what autograd saves of the same model on the CPU."""

from __future__ import annotations

import pytest
import torch
from huggingface.sharding_runs import Run, make_model

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.activations import saved_activations


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_bytes_are_those_that_autograd_saves(name: str) -> None:
    sequences, length = 4, 64
    model = make_model(Run(name)).train()
    seen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept, total = [], 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(storage)
            total += storage.nbytes()
        return tensor

    ids = torch.arange(sequences * length).view(sequences, length) % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    found = saved_activations(model.to("meta"), sequences, length)
    assert found is not None
    assert sum(found.layers) + found.outside == pytest.approx(total, rel=0.01)
    assert len(found.layers) == model.config.num_hidden_layers
    assert found.hidden == hidden.nbytes
    assert found.logits == sequences * length * model.config.vocab_size * (4 + 8)


def test_logits_in_chunks() -> None:
    found = saved_activations(make_model(Run("qwen3_moe")).to("meta"), 2, 8, logits_rows=3)
    assert found is not None
    assert found.logits % 3 == 0
    with pytest.raises(ConfigError, match="logits_rows=0 must be at least 1"):
        saved_activations(make_model(Run("qwen3_moe")).to("meta"), 2, 8, logits_rows=0)
