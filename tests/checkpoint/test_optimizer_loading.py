"""Optimizer states go where a rank's flat partition needs them; nothing else stays in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.tensor_names import state_name
from lightning_fastmoe.zero.restore import _OptimizerLoader
from lightning_fastmoe.zero.state import FlatFragment, FlatPartition

SAVED = {"a": torch.arange(10.0), "b": torch.arange(100.0, 106.0)}
EXPECTED = torch.tensor([0, 0, 3, 4, 5, 6, 0, 100, 101, 102, 0, 0.0])
"""Padding before, between and behind: elements 3 to 6 of ``a``, and 0 to 2 of ``b``."""
STATES = ("exp_avg", "exp_avg_sq")


class Source:
    """Both states of all parameters but those of ``without``."""

    path = Path("saved.ckpt")

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        self.tensors = {
            state_name(key, name): TensorRecord("F32", tuple(values.shape), ())
            for key in STATES
            for name, values in SAVED.items()
            if name not in without
        }

    def read_into(self, tensor: str, start: int, out: torch.Tensor) -> None:
        out.copy_(SAVED[tensor[-1]][start : start + out.numel()])


def loaded(without=(), strict=True, before=None):
    """The partition's states after loading, given those before."""
    master = torch.nn.Parameter(torch.ones(12))
    inner = torch.optim.AdamW([master])
    inner.state[master] = before or {}
    fragments = [FlatFragment(0, 3, "b", 7), FlatFragment(3, 4, "a", 2)]
    flat = FlatPartition(master, fragments, ["a", "b"], inner.param_groups[0], inner)
    model = SimpleNamespace(fragment=lambda name: SimpleNamespace(start=0))
    names = ["a", "b"]
    info = {
        "class": "AdamW",
        "groups": [{"params": names, "options": {"lr": 0.5}}],
        "scalars": [{"params": names, "values": {"step": torch.tensor(7.0)}}],
    }
    _OptimizerLoader(Source(without), model, info, strict).load(flat)
    assert inner.param_groups[0]["lr"] == 0.5
    return inner.state[master]


@pytest.mark.poisoned
def test_new_states_are_zero_where_nothing_is_loaded():
    state = loaded()
    assert state["step"] == 7
    for key in STATES:
        assert torch.equal(state[key], EXPECTED)


@pytest.mark.poisoned
def test_old_states_give_their_memory_and_leave_nothing_in_it():
    before = {key: torch.full((12,), torch.nan) for key in STATES}
    before |= {"step": torch.tensor(99.0)}
    state = loaded(before=dict(before))
    assert state["step"] == 7
    for key in STATES:
        assert state[key].data_ptr() == before[key].data_ptr()
        assert torch.equal(state[key], EXPECTED)


@pytest.mark.poisoned
def test_what_the_checkpoint_does_not_hold_begins_with_zeros():
    before = {key: torch.full((12,), torch.nan) for key in STATES}
    state = loaded(without=("b",), strict=False, before=before)
    for key in STATES:
        assert torch.equal(state[key], torch.where(EXPECTED < 100, EXPECTED, 0.0))
