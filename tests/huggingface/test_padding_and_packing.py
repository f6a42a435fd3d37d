"""Padding and packing change nothing: against the batch without them, and against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface.families import CONFIGS, SIZES, make_model
from huggingface.finetune_runs import train_on, uneven_batch
from huggingface.model_steps import (
    COEFFICIENTS,
    TIGHT,
    draw,
    limited,
    one_row_of,
    our_own,
    rows_of,
    step,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.errors import DataError, ShapeError
from lightning_fastmoe.huggingface.decoder import DecoderLayer
from lightning_fastmoe.nn import moe_layers

V = SIZES["vocab_size"]
LENGTHS = (5, 9, 1, 7)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_equals_the_batch(name, side):
    """Rows of one length: without padding they are a batch that nothing here touches."""
    module = limited(our_own(name))
    tokens = draw(3, 8)
    wide = rows_of([*tokens, draw(11)], side)
    wide = {key: value[:3] for key, value in wide.items()}
    want, got = step(module, tokens), step(module, wide)
    dropped = [routed - kept for pair in want["loads"].values() for routed, kept in pair]
    assert sum(int(d.sum()) for d in dropped) > 0
    torch.testing.assert_close(got, want, **TIGHT)
    shown = module(wide)[wide["attention_mask"] == 1].view(3, 8, V)
    torch.testing.assert_close(shown, module(tokens), **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_equal_packed_documents(name, side):
    """Documents of several lengths, one of a single token, which predicts nothing."""
    module = our_own(name)
    for _, layer in moe_layers(module):
        layer.loss_coefficients = {**layer.loss_coefficients, **COEFFICIENTS}
    documents = list(draw(sum(LENGTHS)).split(LENGTHS))
    packed, padded = step(module, one_row_of(documents)), step(module, rows_of(documents, side))
    torch.testing.assert_close(padded, packed, **TIGHT)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    """Each by itself: logits, and the mean over all their tokens with its gradients."""
    module = our_own(name)
    for _, layer in moe_layers(module):
        layer.loss_coefficients = dict.fromkeys(layer.loss_coefficients, 0.0)
    documents = list(draw(sum(LENGTHS)).split(LENGTHS))
    got = step(module, one_row_of(documents))
    module.zero_grad()
    total, logits = 0.0, []
    for document in documents:
        logits.append(module(document.unsqueeze(0))[0])
        total += F.cross_entropy(logits[-1][:-1], document[1:], reduction="sum")
    want = total / (sum(LENGTHS) - len(LENGTHS))
    want.backward()
    torch.testing.assert_close(got["loss"], want.detach(), **TIGHT)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    torch.testing.assert_close(got["gradients"], gradients, **TIGHT)
    torch.testing.assert_close(module(one_row_of(documents))[0], torch.cat(logits), **TIGHT)


HOW = ["left", "right", "packed"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same(name, how):
    """fp32: logits, loss, and the gradients of all weights but the stacked experts' by name."""
    theirs = make_model(name)
    module = our_own(name, theirs).float()
    for _, layer in moe_layers(module):
        layer.loss_coefficients = dict.fromkeys(layer.loss_coefficients, 0.0)
    documents = list(draw(sum(LENGTHS)).split(LENGTHS))
    batch = one_row_of(documents) if how == "packed" else rows_of(documents, how)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    tokens = batch["input_ids"].masked_fill(~real, 0)
    # transformers doesn't leave these out by itself: padding, and the first token of a document.
    first = F.pad(real[:, :-1], (1, 0)) & real
    if how == "packed":
        first &= batch["position_ids"] != 0
    labels = tokens.masked_fill(~first, -100)
    # With a cache of keys and values transformers doesn't look for documents.
    out = theirs(**{**batch, "input_ids": tokens}, labels=labels, use_cache=False)
    out.loss.backward()
    got = step(module, batch)
    gap = (module(batch) - out.logits)[real].abs().max()
    assert gap < 2e-5
    assert float(got["loss"]) == pytest.approx(float(out.loss), rel=1e-5)
    shared = {n.replace("mlp.gate.", "mlp.router."): p.grad for n, p in theirs.named_parameters()}
    found = 0
    for name_, gradient in got["gradients"].items():
        other = shared.get(name_.removeprefix("network."))
        if other is not None:
            found += 1
            scale = other.abs().max()
            assert (gradient - other).abs().max() < 2e-4 * scale, name_
    assert found >= len(shared) - 2 * len(dict(moe_layers(module)))
    # What is compared depends on the layout: without it the logits are elsewhere.
    if how != "right":
        assert (module(tokens) - out.logits)[real].abs().max() > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_replayed_passes_count_once(monkeypatch, use_reentrant):
    module = limited(our_own("qwen3_moe"))
    documents = list(draw(sum(LENGTHS)).split(LENGTHS))
    want = step(module, rows_of(documents, "left"))
    forward = DecoderLayer.forward
    monkeypatch.setattr(
        DecoderLayer,
        "forward",
        lambda *args: checkpoint(forward, *args, use_reentrant=use_reentrant),
    )
    got = step(module, rows_of(documents, "left"))
    torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_and_batches_of_padding_alone(side):
    module = limited(our_own("mixtral"))
    tokens = draw(2, 6)
    wide = rows_of([*tokens, torch.empty(0, dtype=torch.int64)], side)
    torch.testing.assert_close(step(module, wide), step(module, tokens), **TIGHT)
    nothing = {key: value[2:] for key, value in wide.items()}
    left = step(module, nothing)
    assert left["loss"] == 0
    assert all(not gradient.any() for gradient in left["gradients"].values())


def test_labels_that_are_not_learned_and_none_that_are():
    module = our_own("olmoe")
    tokens = draw(2, 6)
    labels = tokens.clone()
    labels[:, 3:] = -100
    loss = step(module, {"input_ids": tokens, "labels": labels})["loss"]
    logits = module(tokens)[:, :2]
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:3].flatten())
    )
    none = step(module, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    assert none["loss"] == 0


def test_the_mean_of_val_loss_is_over_tokens_however_they_are_batched():
    module = our_own("mixtral").eval()
    documents = list(draw(sum(LENGTHS)).split(LENGTHS))

    def mean(batches) -> float:
        seen = []
        module.log = lambda name, value, **kwargs: seen.append((value, kwargs["batch_size"]))
        for batch in batches:
            module.validation_step(batch, 0)
        return float(sum(v * n for v, n in seen) / sum(n for _, n in seen))

    want = mean([one_row_of(documents)])
    assert mean([document.unsqueeze(0) for document in documents]) == pytest.approx(want, rel=1e-9)
    pairs = [rows_of(documents[:2], "left"), rows_of(documents[2:], "right")]
    assert mean(pairs) == pytest.approx(want, rel=1e-9)


def test_the_example_of_the_docs_runs():
    page = Path(__file__).parents[2] / "docs" / "padding_and_packing.md"
    block = page.read_text().split("```python\n")[1].split("```")[0]
    exec(block, {})  # noqa: S102  it asserts by itself


def test_what_a_batch_must_not_have():
    module = our_own("mixtral")
    tokens = draw(2, 6)
    for method in (module, lambda batch: module.training_step(batch, 0),
                   lambda batch: module.validation_step(batch, 0)):  # fmt: skip
        with pytest.raises(DataError, match="has token_type_ids, which MoECausalLM does not"):
            method({"input_ids": tokens, "token_type_ids": tokens})
        with pytest.raises(ShapeError, match="attention_mask is a tensor of shape"):
            method({"input_ids": tokens, "attention_mask": torch.ones(2, 1, 6, 6)})


# ----------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize(("ep", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_ranks_with_different_numbers_of_tokens(rank_pool, ep, stage):
    """Two ranks equal one process that accumulates their batches: losses, terms, weights."""
    config = make_model("qwen3_moe").config.to_dict()
    (one,) = rank_pool.run(train_on, 1, config, 1, 1, 2, 2)
    counts = [int(uneven_batch(rank)["attention_mask"].sum()) for rank in range(2)]
    assert counts[0] > 3 * counts[1]
    for rank, trained in enumerate(rank_pool.run(train_on, 2, config, 2, ep, stage, 1)):
        assert trained.losses == pytest.approx(one.losses[rank::2], rel=1e-5)
        for got, want in zip(trained.terms, one.terms[rank::2], strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        assert trained.val_loss == pytest.approx(one.val_loss, rel=1e-5)
        assert trained.routed == one.routed[rank::2]
        for name, value in trained.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=1e-4, atol=1e-6)
