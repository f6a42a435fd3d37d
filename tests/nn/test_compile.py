from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from torch import nn

from lightning_fastmoe.nn import MoE

pytestmark = pytest.mark.poisoned(False)  # dynamo knows torch.empty by identity

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = MoE(8, 16, 4, load_balancing=0.3, z_loss=0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.moe(self.norm(x)) + x))


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        pytest.param("eager", (5, 9, 5), id="eager"),
        pytest.param("aot_eager", (5,), id="aot_eager"),
        pytest.param("inductor", (5,), id="inductor", marks=needs_compiler),
    ],
)
def test_compiled_model_equals_eager(backend, sizes):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Block()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend=backend)
    calls = []
    compiled.moe.register_routing_observer(lambda *args: calls.append(args))
    for tokens in sizes:
        x = torch.randn(2, tokens, 8)
        got, want = run(x), eager(x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        for model, y in ((compiled, got), (eager, want)):
            model.zero_grad()
            loss = y.square().mean()
            model.moe.loss_scale.watch(loss)
            (loss * 4).backward()
        for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert len(calls) == len(sizes)
