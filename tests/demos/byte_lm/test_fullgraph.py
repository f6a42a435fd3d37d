"""The example's blocks as one graph each, trained for a few steps next to plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from lightning_fastmoe.demos.byte_lm import MoELanguageModel


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_blocks_with_fullgraph_train_to_the_same_numbers(dtype, tolerance) -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ffn": 8, "num_experts": 4}
    model = MoELanguageModel(**sizes, init_std=0.2, load_balancing=0.1, z_loss=0.01)
    model.configure_model()
    plain = model.network.to(dtype)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    start = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (plain, compiled)]
    generator = torch.Generator().manual_seed(2)
    for seq_len in (8, 12, 9, 8):
        tokens = torch.randint(0, 256, (2, seq_len), generator=generator).byte()
        losses = []
        for model, optimizer in zip((plain, compiled), optimizers, strict=True):
            logits = model(tokens)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    # Two blocks, three lengths: one graph.
    assert counters["stats"]["unique_graphs"] == 1
    for p, q, old in zip(*(m.parameters() for m in (compiled, plain, start)), strict=True):
        moved = float((q - old).detach().norm())
        assert moved > 0
        assert float((p - q).detach().norm()) <= tolerance * moved
