"""The loss in chunks whose kernels are compiled: as exact as the loss of all logits, and small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_fastmoe.huggingface import head as head_module
from lightning_fastmoe.huggingface.head import Head

D, V, N = 256, 5003, 1000


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_loss_and_gradients(
    compiles: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(head_module, "LIMIT", 300 * V * 4)  # chunks of 300, 300, 300, 100
    kept = torch.float32 if autocast else torch.bfloat16
    head = Head(D, V, 0.1).to("cuda", kept)
    head.compiles_loss = compiles
    x = torch.randn(N, D, device="cuda").to(kept).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    targets[::7] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert head.computes_loss_of(x)
        loss = head(x, targets)
    found = torch.autograd.grad(loss / N, (x, head.weight))

    # Of the same bf16 numbers, and what rounding their logits to bf16 once makes of it.
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, head.weight)]
    exact = F.cross_entropy(F.linear(*wide), targets, reduction="sum")
    plain = F.cross_entropy(F.linear(*wide).bfloat16().double(), targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    for ours, right in zip(found, torch.autograd.grad(exact / N, wide), strict=True):
        assert ours.dtype == kept
        assert float((ours - right).norm()) <= 1e-2 * float(right.norm())


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, no fp32 copy of a chunk's logits exists: they, and their gradients in bf16."""
    rows, vocab = 1024, 32768
    monkeypatch.setattr(head_module, "LIMIT", rows * vocab * 4)
    head = Head(D, vocab, 0.1).to("cuda", torch.bfloat16)
    x = torch.randn(8 * rows, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocab, (8 * rows,), device="cuda")
    peaks = {}
    for compiles in (True, False):
        head.compiles_loss = compiles
        for _ in range(2):  # the first one compiles
            head.zero_grad(set_to_none=True)
            x.grad = None
            torch.cuda.synchronize()
            rest = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            head(x, targets).backward()
            peaks[compiles] = torch.cuda.max_memory_allocated() - rest
    chunk, gradients = rows * vocab * 2, (D * vocab + 8 * rows * D) * 2
    assert peaks[True] <= 2.1 * chunk + 2 * gradients
    assert peaks[False] <= 6 * chunk + 2 * gradients  # all logits in fp32 would be 16 chunks


def test_compiled_also_where_logits_are_small() -> None:
    head = Head(D, 64, 0.1).to("cuda", torch.bfloat16)
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    assert not head.computes_loss_of(x)
    head.compiles_loss = True
    assert head.computes_loss_of(x)
    assert not head.half().computes_loss_of(x.half())
    head.bfloat16()
    targets = torch.randint(64, (N,), device="cuda")
    exact = F.cross_entropy(head(x).double(), targets, reduction="sum")
    assert float(head(x, targets)) == pytest.approx(float(exact), rel=1e-5)
