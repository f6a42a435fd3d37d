"""Replacing parts of a model: each once, under all its names, or a clear error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import convert


class FFN(nn.Sequential):
    """Something to replace, with a module of the same kind inside."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def test_parts_are_replaced_under_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(FFN(), nn.Tanh()), "b": FFN()})
    found = convert(model, lambda _, m: isinstance(m, FFN), lambda m: MoE(4, 8, 3))
    assert sorted(found) == ["a.0", "b"]
    assert model["b"] is found["b"]
    assert model["a"][0] is found["a.0"]
    assert isinstance(model["a"][1], nn.Tanh)
    assert not any(isinstance(m, FFN) for m in model.modules())
    assert model["a"](torch.randn(5, 4)).shape == (5, 4)


def test_a_shared_part_is_replaced_once_and_stays_shared() -> None:
    shared = FFN()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    made: list[nn.Module] = []
    convert(model, lambda _, m: m is shared, lambda m: made.append(nn.Tanh()) or made[-1])
    assert len(made) == 1
    assert model["a"] is model["b"][0] is made[0]


def test_what_is_inside_a_part_is_not_looked_at() -> None:
    model = nn.Sequential(nn.Sequential(FFN()))
    names: list[str] = []
    convert(model, lambda name, m: names.append(name) or name == "0", lambda m: nn.Sequential(m))
    assert names == ["", "0"]


def test_names_can_be_matched() -> None:
    model = nn.Sequential(FFN(), FFN())
    assert list(convert(model, lambda name, _: name == "1", lambda m: nn.Tanh())) == ["1"]
    assert isinstance(model[0], FFN)


def test_nothing_that_matches_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no module .* classes are Linear, Sequential"):
        convert(nn.Sequential(nn.Linear(2, 2)), lambda *_: False, lambda m: m)
    with pytest.raises(ConfigError, match="the model itself matches"):
        convert(FFN(), lambda _, m: isinstance(m, FFN), lambda m: m)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(FFN(), FFN())
    before = list(model)

    def fail_at_the_second(module: nn.Module) -> nn.Module:
        if module is before[1]:
            raise ConfigError("no")
        return nn.Tanh()

    with pytest.raises(ConfigError, match="no"):
        convert(model, lambda _, m: isinstance(m, FFN), fail_at_the_second)
    assert list(model) == before


def test_a_parent_with_two_names_is_walked_once() -> None:
    inner = nn.Sequential(FFN())
    model = nn.ModuleDict({"a": inner, "b": inner})
    found = convert(model, lambda _, m: isinstance(m, FFN), lambda m: nn.Sequential(m))
    assert list(found) == ["a.0"]
    assert isinstance(model["b"][0][0], FFN)
