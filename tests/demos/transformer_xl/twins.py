"""Relative attention and the network, as the formulas say: one score at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_fastmoe.demos.transformer_xl.attention import RelativeAttention
from lightning_fastmoe.demos.transformer_xl.network import MoETransformerXL


def encoding(distance: int, d_model: int) -> Tensor:
    """r of a distance, (d_model,), in fp64."""
    angles = [distance / 10_000 ** (2 * n / d_model) for n in range(d_model // 2)]
    waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(waves, dtype=torch.float64)


def attend(
    attention: RelativeAttention, query_at: int, states: Tensor, first: int, position: int
) -> Tensor:
    """What the query at ``position`` takes from keys ``first, ..., position``, (d_model,).

    Args:
        attention: the module, for its weights.
        query_at: row of ``states`` that asks.
        states: (rows, d_model), the row of position p is ``query_at - position + p``.
        first: the first position that is seen.
        position: the position that asks.
    """
    d_model = states.shape[1]
    heads, width = attention.num_heads, d_model // attention.num_heads
    u, v = attention.content_bias[:, 0], attention.position_bias[:, 0]
    query = (attention.query.weight @ states[query_at]).view(heads, width)
    mixed = []
    for head in range(heads):
        scores, values = [], []
        for key_position in range(first, position + 1):
            row = states[query_at - position + key_position]
            key, value = (attention.key_value.weight @ row).view(2, heads, width)[:, head]
            distance = position - key_position
            place = (attention.position.weight @ encoding(distance, d_model)).view(heads, width)
            content_term = (query[head] + u[head]) @ key
            position_term = (query[head] + v[head]) @ place[head]
            scores.append((content_term + position_term) / math.sqrt(width))
            values.append(value)
        weights = torch.stack(scores).softmax(0)
        mixed.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return attention.out.weight @ torch.cat(mixed)


def logits_of_streams(
    network: MoETransformerXL, tokens: Tensor, seq_len: int, mem_len: int, segmented_moe: bool
) -> Tensor:
    """Logits of whole streams, (batch, length, 256), as if they had never been cut into segments.

    A position sees what it would see in segments: from ``mem_len`` positions before the segment
    that it is in, up to itself; and no gradient enters what is before that segment.

    Args:
        network: the network, for its weights.
        tokens: (batch, length).
        seq_len: length of a segment.
        mem_len: positions of memory.
        segmented_moe: run the experts segment by segment, whose balancing losses are means.
    """
    x = network.embedding(tokens.long())
    for block in network.blocks:
        normed = block.attention_norm(x)
        rows = []
        for b in range(len(tokens)):
            outs = []
            for i in range(tokens.shape[1]):
                start = i // seq_len * seq_len
                # The memory's states are constants; its weights are not.
                states = torch.cat((block.attention_norm(x[b, :start].detach()), normed[b, start:]))
                first = max(0, start - mem_len)
                outs.append(attend(block.attention, i, states, first, i))
            rows.append(torch.stack(outs))
        x = x + torch.stack(rows)
        pieces = x.split(seq_len, dim=1) if segmented_moe else (x,)
        x = torch.cat([piece + block.moe(block.moe_norm(piece)) for piece in pieces], dim=1)
    return network.readout(network.norm(x))
