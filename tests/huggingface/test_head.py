"""The loss in chunks of positions: the value and gradients of the loss on whole logits."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from huggingface.families import CONFIGS
from huggingface.finetune_runs import count_chunks, train_on
from huggingface.model_steps import TIGHT, draw, one_row_of, our_own, rows_of, step
from torch import Tensor

from lightning_fastmoe.huggingface import chunked_loss
from lightning_fastmoe.huggingface import head as head_module
from lightning_fastmoe.huggingface.batch import IGNORED
from lightning_fastmoe.huggingface.head import Head

D, V, N = 6, 31, 20


def allow(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int = V) -> None:
    """Chunks of this many positions."""
    monkeypatch.setattr(head_module, "LIMIT", rows * vocab * 4)


def problem(bias: bool = False) -> tuple[Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = Head(D, V, 0.5, bias=bias).double()
    x = torch.randn(N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 7, 8, 13]] = IGNORED
    return head, x, targets


def by_hand(head: Head, x: Tensor, targets: Tensor) -> Tensor:
    """One position after the other, without the operators that are tested."""
    total = x.new_zeros(())
    for row, target in zip(x, targets.tolist(), strict=True):
        if target != IGNORED:
            logits = head.weight @ row + (0 if head.bias is None else head.bias)
            total = total + logits.exp().sum().log() - logits[target]
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7, N, 2 * N])
def test_loss_and_gradients(monkeypatch, rows, bias):
    head, x, targets = problem(bias)
    allow(monkeypatch, rows)
    inputs = (x, *head.parameters())
    want, got = by_hand(head, x, targets), head(x, targets)
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * want, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", ["bf16", "fp16", "autocast to bf16", "autocast to fp16"])
def test_half_precision_sums_in_fp32(monkeypatch, how):
    """Logits are rounded, their gradients too; fp16's are found by a backward pass of its own."""
    dtype = torch.bfloat16 if "bf16" in how else torch.float16
    head, x, targets = problem()
    allow(monkeypatch, 3)
    autocast = torch.autocast("cpu", dtype, enabled=how.startswith("autocast"))
    kept = torch.float32 if how.startswith("autocast") else dtype
    head, x = head.to(kept), x.detach().to(kept).requires_grad_()
    with autocast:
        got = head(x, targets)
    assert got.dtype == torch.float32
    assert ("ChunkedCrossEntropy" in str(got.grad_fn)) == (dtype == torch.bfloat16)
    logits = F.linear(x.to(dtype), head.weight.to(dtype)).double()
    want = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    inputs = (x, head.weight)
    for mine, exact in zip(
        torch.autograd.grad(got / N, inputs), torch.autograd.grad(want / N, inputs), strict=True
    ):
        assert mine.dtype == kept
        assert (mine - exact).norm() <= 1e-2 * exact.norm()


def test_autocast_leaves_fp64_alone(monkeypatch):
    head, x, targets = problem()
    allow(monkeypatch, 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x, targets), by_hand(head, x, targets), rtol=1e-13, atol=0)


def test_gradients_nobody_asks_for(monkeypatch):
    head, x, targets = problem(bias=True)
    allow(monkeypatch, 3)
    want = torch.autograd.grad(by_hand(head, x, targets), (x, head.weight, head.bias))
    for wanted in range(8):
        own = x.detach().requires_grad_(bool(wanted & 1))
        head.weight.requires_grad_(bool(wanted & 2))
        head.bias.requires_grad_(bool(wanted & 4))
        loss = head(own, targets)
        assert loss.requires_grad == (wanted > 0)
        if wanted:
            loss.backward()
        for i, leaf in enumerate((own, head.weight, head.bias)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, want[i], rtol=1e-12, atol=1e-13)
                leaf.grad = None
    with torch.no_grad(), patch.object(chunked_loss, "_loss_and_gradient", None):
        torch.testing.assert_close(head(x, targets), by_hand(head, x, targets))


def test_backward_twice_and_second_derivatives(monkeypatch):
    head, x, targets = problem()
    allow(monkeypatch, 3)
    loss = head(x, targets)
    once, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    inputs = (x, head.weight)
    second = []
    for computed in (loss, by_hand(head, x, targets)):
        first = torch.autograd.grad(computed, inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_a_compiler_joins_is_the_same(dtype):
    _, x, targets = problem()
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 5).to(dtype)
    leaf = logits.to(torch.float64, copy=True).requires_grad_()
    want = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="sum")
    (exact,) = torch.autograd.grad(want, leaf)
    close = {torch.bfloat16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for compute in (
        chunked_loss._in_one_pass,
        lambda *given: chunked_loss._loss_and_gradient(*given, False),
    ):
        loss, gradient = compute(logits.clone(), targets)
        assert gradient.dtype == dtype
        assert float(loss) == pytest.approx(float(want.detach()), rel=1e-6)
        torch.testing.assert_close(gradient.double(), exact, rtol=close, atol=close * 0.1)


def test_logits_are_not_kept(monkeypatch):
    """Neither between the passes nor within one: no tensor is larger than a chunk."""
    head, x, targets = problem()
    allow(monkeypatch, 3)
    kept: list[Tensor] = []
    largest = 0
    original = F.linear

    def measured(*arguments):
        nonlocal largest
        out = original(*arguments)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(F, "linear", measured)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = head(x, targets)
    # The hidden states, the weight and their gradients, and the targets.
    assert sum(t.numel() for t in kept) == 2 * (N * D + V * D) + N
    loss.backward()
    assert largest == 3 * V


def test_nothing_to_predict(monkeypatch):
    head, x, targets = problem()
    allow(monkeypatch, 3)
    loss = head(x, torch.full_like(targets, IGNORED))
    loss.backward()
    assert float(loss) == 0
    assert not head.weight.grad.any()
    assert not x.grad.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step(monkeypatch, name):
    """Padded and packed batches, with every loss of the MoE layers beside."""
    module = our_own(name)
    documents = list(draw(19).split((7, 1, 11)))
    vocab = module.network.lm_head.out_features
    for batch in (one_row_of(documents), rows_of(documents, "left")):
        want = copy.deepcopy(step(module, batch))
        with monkeypatch.context() as patch:
            allow(patch, 4, vocab)
            with count_chunks() as chunks:
                got = step(module, batch)
        assert len(chunks) >= 5
        torch.testing.assert_close(got, want, **TIGHT)


def test_tied_embeddings(monkeypatch):
    module = our_own("qwen3_moe")
    module.network.lm_head.weight = module.network.model.embed_tokens.weight
    tokens = draw(2, 9)
    want = copy.deepcopy(step(module, tokens))
    allow(monkeypatch, 4, module.network.lm_head.out_features)
    with count_chunks() as chunks:
        torch.testing.assert_close(step(module, tokens), want, **TIGHT)
    assert chunks == [4] * 4


def test_small_logits_are_computed_at_once(monkeypatch):
    """The limit itself is not large; logits for generation are whole however large they are."""
    module = our_own("olmoe").float()
    tokens = draw(2, 9)
    vocab = module.network.lm_head.out_features
    allow(monkeypatch, 18, vocab)
    want = F.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    with count_chunks() as chunks:
        torch.testing.assert_close(step(module, tokens)["loss"], want, rtol=1e-6, atol=0)
        allow(monkeypatch, 17, vocab)
        assert module(tokens).shape == (2, 9, vocab)
        assert chunks == []
        step(module, tokens)
    assert chunks == [16]


def test_another_head_is_called_for_its_logits(monkeypatch):
    """Someone's own output layer knows nothing of targets."""
    module = our_own("mixtral")
    ours = module.network.lm_head
    tokens = draw(2, 9)
    want = step(module, tokens)["loss"]
    allow(monkeypatch, 1, ours.out_features)
    plain = torch.nn.Linear(ours.in_features, ours.out_features, bias=False).double()
    plain.weight = ours.weight
    module.network.lm_head = plain
    torch.testing.assert_close(step(module, tokens)["loss"], want, rtol=0, atol=0)


def test_compiled(monkeypatch):
    head, x, targets = problem()
    allow(monkeypatch, 8)
    want = head(x, targets)
    want.backward()
    expected, head.weight.grad = head.weight.grad, None
    got = torch.compile(head, backend="aot_eager", fullgraph=True)(x, targets)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("stage", "ep"), [(1, 2), (2, 1), (3, 2), (3, 1)])
def test_ranks_with_different_numbers_of_chunks(rank_pool, stage, ep):
    """Rank 0 has 33 positions, rank 1 has 12: at stage 3 both still gather the weight as often."""
    config = our_own("qwen3_moe").config
    vocab = config["vocab_size"]
    whole = rank_pool.run(train_on, 2, config, 2, ep, stage, 1)
    chunks = rank_pool.run(train_on, 2, config, 2, ep, stage, 1, 5 * vocab * 4)
    for rank, (want, got) in enumerate(zip(whole, chunks, strict=True)):
        assert want.chunks == 0
        # Three training steps, and three times one or two validations.
        assert got.chunks >= 3 * (1 + 1) * (7, 3)[rank]
        assert got.losses == pytest.approx(want.losses, rel=1e-5)
        assert got.val_loss == pytest.approx(want.val_loss, rel=1e-5)
        for name, value in want.weights.items():
            torch.testing.assert_close(got.weights[name], value, rtol=1e-4, atol=2e-6)
