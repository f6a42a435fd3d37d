"""What is remembered, for how long, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.demos.transformer_xl import Memory
from lightning_fastmoe.errors import ConfigError


def states(start: int, length: int, layers: int = 2) -> list[torch.Tensor]:
    """(1, length, 1): positions, in layer n plus 100 * n."""
    positions = torch.arange(start, start + length).double().view(1, -1, 1)
    return [positions + 100 * n for n in range(layers)]


@pytest.mark.parametrize("length", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("segment", [1, 3, 4, 6])
def test_the_last_positions_are_remembered_in_order(length: int, segment: int) -> None:
    memory = Memory(length)
    for start in range(0, 4 * segment, segment):
        memory.append(states(start, segment))
        end = start + segment
        first = max(0, end - length)
        for layer, expected in zip(memory.layers, states(first, end - first), strict=True):
            assert torch.equal(layer, expected)
    memory.reset()
    assert memory.layers == []


def test_no_length_remembers_nothing() -> None:
    memory = Memory(0)
    memory.append(states(0, 3))
    assert memory.layers == []


def test_the_graph_ends_at_the_memory() -> None:
    memory = Memory(4)
    hidden = [s.requires_grad_() for s in states(0, 3)]
    memory.append(hidden)
    assert not any(layer.requires_grad for layer in memory.layers)


def test_state_is_a_copy_and_a_shorter_memory_keeps_its_end() -> None:
    memory = Memory(5)
    memory.append(states(0, 5))
    state = memory.state_dict()
    for layer in memory.layers:
        layer.zero_()
    for length, first in ((9, 0), (5, 0), (2, 3)):
        restored = Memory(length)
        restored.append(states(50, 5))
        restored.load_state_dict(state)
        expected = states(first, 5 - first)
        assert all(map(torch.equal, restored.layers, expected))


def test_a_restored_memory_moves_to_where_the_model_is() -> None:
    """It is loaded on the CPU; meta stands for any other device."""
    memory = Memory(5)
    memory.append(states(0, 3))
    state, restored = memory.state_dict(), Memory(5)
    restored.load_state_dict(state)
    restored.append([s.to("meta", torch.bfloat16) for s in states(3, 1)])
    assert [(s.device.type, s.dtype, s.shape[1]) for s in restored.layers] == [
        ("meta", torch.bfloat16, 4)
    ] * 2


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="mem_len is -1"):
        Memory(-1)
