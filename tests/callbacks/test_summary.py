"""What MoESummary prints; test_memory.py checks its numbers against DeepSpeed's."""

from __future__ import annotations

from callbacks.model import Model, make_trainer

from lightning_fastmoe import MoESummary
from lightning_fastmoe.callbacks.summary import memory_text, parameters_text
from lightning_fastmoe.sizes import LayerSize, ModelSize
from lightning_fastmoe.strategy.memory import Bytes, MemoryPlan


def test_under_another_strategy_the_parameters_alone(tmp_path, capsys):
    summary, model = MoESummary(), Model()
    make_trainer(tmp_path, summary).fit(model)
    assert summary.size.total == sum(p.numel() for p in model.parameters())
    assert summary.memory is None
    out = capsys.readouterr().out
    assert "1 MoE layer (first): 4 experts of 256, 4 on this rank, 2 per token." in out
    assert "weights" not in out


def test_layers_that_are_alike_share_a_line():
    layer = LayerSize(64, 32, 1_966_080.0, 8)
    size = ModelSize(50_000_000, 0, {f"blocks.{i}.moe": layer for i in range(8)})
    assert parameters_text(size) == [
        "Parameters: 1.06 B, of which a token uses 175.83 M (17%); 50.00 M outside of experts.",
        "8 MoE layers (blocks.0.moe .. blocks.7.moe): 64 experts of 1.97 M, 32 on this rank,"
        " 8 per token.",
    ]


def test_table():
    host = frozenset({"optimizer"})
    memory = MemoryPlan(
        Bytes(2**30, 2**29, 3 * 2**30, on_host=host),
        Bytes(2**31, 2**30, 6 * 2**30, on_host=host),
        Bytes(buffers=2**28),
        None,
    )
    assert memory_text(memory) == [
        "per rank                               dense  experts   together",
        "weights                              1.0 GiB  2.0 GiB    3.0 GiB",
        "gradients                          512.0 MiB  1.0 GiB    1.5 GiB",
        "optimizer and fp32 weights (host)    3.0 GiB  6.0 GiB    9.0 GiB",
        "communication buffers                                  256.0 MiB",
        "on the device                        1.5 GiB  3.0 GiB    4.8 GiB",
        "Activations, and what stage 3 gathers for a moment, come on top.",
        "The optimizer's own states are unknown, and not included.",
    ]
