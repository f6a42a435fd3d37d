"""The loss in chunks of positions: the value and gradients of the loss on whole logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface.families import CONFIGS
from huggingface.finetune_runs import count_chunks, train_on
from huggingface.model_steps import TIGHT, draw, one_row_of, our_own, rows_of, step
from torch import Tensor

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(monkeypatch, dtype):
    head, x, targets = problem()
    allow(monkeypatch, 3)
    head, x = head.to(dtype), x.detach().to(dtype)
    got = head(x, targets)
    assert got.dtype == torch.float32
    logits = F.linear(x, head.weight).double()
    want = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)


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
    assert sum(t.numel() for t in kept) <= N * D + N + V * D
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
        assert len(chunks) >= 2 * 5
        torch.testing.assert_close(got, want, **TIGHT)


def test_tied_embeddings(monkeypatch):
    module = our_own("qwen3_moe")
    module.network.lm_head.weight = module.network.model.embed_tokens.weight
    tokens = draw(2, 9)
    want = copy.deepcopy(step(module, tokens))
    allow(monkeypatch, 4, module.network.lm_head.out_features)
    with count_chunks() as chunks:
        torch.testing.assert_close(step(module, tokens), want, **TIGHT)
    assert chunks == [4] * 8


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
    assert chunks == [16, 16]  # forward, and again in backward


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
        # Three training steps and their recomputation, and three times one or two validations.
        assert got.chunks >= 3 * (2 + 1) * (7, 3)[rank]
        assert got.losses == pytest.approx(want.losses, rel=1e-5)
        assert got.val_loss == pytest.approx(want.val_loss, rel=1e-5)
        for name, value in want.weights.items():
            torch.testing.assert_close(got.weights[name], value, rtol=1e-4, atol=2e-6)
