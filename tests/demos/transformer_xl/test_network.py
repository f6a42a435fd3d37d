"""Segments with memory against streams that were never cut, in fp64; causality; the span."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from demos.transformer_xl.twins import logits_of_streams
from torch import Tensor

from lightning_fastmoe.demos.transformer_xl import Memory
from lightning_fastmoe.demos.transformer_xl.network import MoETransformerXL
from lightning_fastmoe.errors import ShapeError

SEQ_LEN = 4


def build(num_layers: int) -> MoETransformerXL:
    torch.manual_seed(0)
    return MoETransformerXL(
        d_model=8,
        num_layers=num_layers,
        num_heads=2,
        d_ffn=8,
        num_experts=4,
        top_k=2,
        load_balancing=0.01,
        init_std=0.4,
    ).double()


def text(length: int) -> Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1)).byte()


def in_segments(network: MoETransformerXL, tokens: Tensor, mem_len: int) -> Tensor:
    memory, parts = Memory(mem_len), []
    for segment in tokens.split(SEQ_LEN, dim=1):
        logits, hidden = network(segment, memory.layers)
        memory.append(hidden)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("mem_len", [0, 2, 4, 6, 20])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_segments_compute_what_whole_streams_do(num_layers: int, mem_len: int) -> None:
    network, tokens = build(num_layers), text(3 * SEQ_LEN)
    with torch.no_grad():
        found = in_segments(network, tokens, mem_len)
        expected = logits_of_streams(network, tokens, SEQ_LEN, mem_len, segmented_moe=False)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if mem_len >= 2 * SEQ_LEN:  # then nothing is ever forgotten
            torch.testing.assert_close(found, network(tokens)[0], rtol=1e-12, atol=1e-12)
        # Not vacuous: less memory gives other logits, from the second segment on.
        less = in_segments(network, tokens, max(0, min(mem_len, 2 * SEQ_LEN) - 3))
        assert torch.equal(less[:, :SEQ_LEN], found[:, :SEQ_LEN])
        assert ((less - found)[:, SEQ_LEN:].abs().max() > 1e-3) == (mem_len > 0)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_gradients_end_at_the_segment(num_layers: int) -> None:
    """Those of every weight, over all segments, against the twin that carries hidden states."""
    network, tokens = build(num_layers), text(3 * SEQ_LEN)
    targets = text(3 * SEQ_LEN).flip(1).long()
    gradients = []
    for logits in (
        in_segments(network, tokens, 6),
        logits_of_streams(network, tokens, SEQ_LEN, 6, segmented_moe=True),
    ):
        network.zero_grad()
        F.cross_entropy(logits.transpose(1, 2), targets).backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for name, twin in gradients[1].items():
        assert twin.abs().max() > 1e-6, name
        torch.testing.assert_close(gradients[0][name], twin, rtol=1e-9, atol=1e-12, msg=name)


def test_a_segment_is_causal_and_sees_all_of_its_memory() -> None:
    network, tokens = build(2), text(2 * SEQ_LEN)
    with torch.no_grad():
        before = in_segments(network, tokens, SEQ_LEN)
        for changed in range(2 * SEQ_LEN):
            other = tokens.clone()
            other[:, changed] ^= 1
            moved = (in_segments(network, other, SEQ_LEN) - before).abs().amax(dim=(0, 2))
            assert (moved[:changed] < 1e-13).all()
            assert (moved[changed:] > 1e-6).all()


def test_one_layer_forgets_what_is_further_back_than_its_memory() -> None:
    network, tokens = build(1), text(3 * SEQ_LEN)
    other = tokens.clone()
    other[:, 2 * SEQ_LEN - 3] ^= 1
    with torch.no_grad():
        found = [in_segments(network, t, 2)[:, 2 * SEQ_LEN :] for t in (tokens, other)]
        assert torch.equal(*found)
        found = [in_segments(network, t, 3)[:, 2 * SEQ_LEN :] for t in (tokens, other)]
        assert (found[0] - found[1]).abs().max() > 1e-6


def test_memory_of_other_streams_is_refused() -> None:
    network, memory = build(1), Memory(4)
    memory.append(network(text(SEQ_LEN))[1])
    with pytest.raises(ShapeError, match="memory is of 2 streams, and the batch has 1 rows"):
        network(text(SEQ_LEN)[:1], memory.layers)
