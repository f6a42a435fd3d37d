"""torch.compile in all the ways that people use: same numbers, same names, same checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from strategy.compiled_runs import WAYS, all_ways
from strategy.models import Case
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.strategy.compiled import unwrap_compiled

CASE = Case(world=2, ep=2, num_experts=(4, 6), steps=2)
# Tracing through the hooks of ZeRO 3 takes seconds each time.
SOME = ("attribute", "blocks", "whole", "late")


@pytest.mark.parametrize(("stage", "ways"), [(1, ("attribute", "whole")), (2, WAYS), (3, SOME)])
def test_compiled_equals_plain(
    stage: int, ways: tuple[str, ...], tmp_path: Path, rank_pool
) -> None:
    """Bit by bit, as the back end "eager" computes what the plain model does."""
    case = replace(CASE, stage=stage)
    for outcomes in rank_pool.run(all_ways, 2, case, str(tmp_path), ways, timeout=300):
        plain = outcomes["plain"]
        assert plain.layers == ["net.blocks.0.moe", "net.blocks.1.moe"]
        assert plain.graphs == 0
        assert outcomes["whole"].validated == plain.validated != 0
        pairs = [*((plain, outcomes[way]) for way in ways), (outcomes["third"], outcomes["back"])]
        for way, (expected, outcome) in zip([*ways, "back"], pairs, strict=True):
            assert (outcome.graphs > 0) == (way != "back"), way
            assert len(outcome.losses) == CASE.steps
            assert outcome.losses == expected.losses, way
            assert outcome.layers == expected.layers, way
            assert outcome.checkpoint.keys() == expected.checkpoint.keys(), way
            for name, value in expected.checkpoint.items():
                assert torch.equal(outcome.checkpoint[name], value), (way, name)


def test_hooks_on_the_wrapper_are_refused() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    inner[0] = torch.compile(inner[0], backend="eager")
    inner[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="'model.0'.*module.compile"):
        unwrap_compiled(nn.ModuleDict({"model": inner}))


def test_layers_have_no_wrapper_in_their_names() -> None:
    """Without a strategy, too."""
    layer = MoE(4, 8, 2, top_k=1)
    inside = nn.Sequential(torch.compile(layer, backend="eager"))
    for module, name in ((inside, "0"), (torch.compile(inside), "0"), (torch.compile(layer), "")):
        assert [name for name, _ in moe_layers(module)] == [name]


@pytest.mark.parametrize("name", ["weights.pt", "lightning.ckpt", "weights.safetensors"])
def test_files_of_compiled_models_that_others_wrote(name: str, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 3))
    compiled = torch.compile(nn.Sequential(torch.compile(plain[0], backend="eager")))
    state = compiled.state_dict()
    assert set(state) == {"_orig_mod.0._orig_mod.weight", "_orig_mod.0._orig_mod.bias"}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, path)
    source = open_file(path, trusted=False)
    assert set(source.tensors) == {f"weights/{name}" for name in plain.state_dict()}
    row = torch.empty(2)
    source.read_into("weights/0.weight", 2, row)
    assert torch.equal(row, plain[0].weight[1])
