"""What MoESummary prints; test_memory.py checks its numbers against DeepSpeed's."""

from __future__ import annotations

import io

import pytest
from callbacks.model import Model, make_trainer
from rich.console import Console

from lightning_fastmoe import MoESummary
from lightning_fastmoe.monitoring.callbacks import summary as module
from lightning_fastmoe.monitoring.callbacks.summary_tables import print_tables
from lightning_fastmoe.monitoring.callbacks.summary_text import (
    Summary,
    memory_text,
    parameters_text,
    plain_text,
)
from lightning_fastmoe.planning.memory import Bytes, MemoryPlan
from lightning_fastmoe.planning.sizes import LayerSize, ModelSize


def fit(tmp_path, capsys) -> str:
    summary, model = MoESummary(), Model()
    make_trainer(tmp_path, summary).fit(model)
    assert summary.size.total == sum(p.numel() for p in model.parameters())
    assert summary.memory is None
    return capsys.readouterr().out


def test_under_another_strategy_the_parameters_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = fit(tmp_path, capsys)
    assert "1 MoE layer: first" in out
    assert "whole model" in out
    assert "weights" not in out


def test_plain_text_without_rich(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    out = fit(tmp_path, capsys)
    assert "1 MoE layer (first): 4 experts of 256, 4 on this rank, 2 per token." in out
    assert out.startswith("\nParameters: ")
    assert out.isascii()


def test_layers_that_are_alike_share_a_line():
    layer = LayerSize(64, 32, 1_966_080.0, 8)
    size = ModelSize(50_000_000, 0, {f"blocks.{i}.moe": layer for i in range(8)})
    assert parameters_text(size) == [
        "Parameters: 1.06 B, of which a token uses 175.83 M (17%); 50.00 M outside of experts.",
        "8 MoE layers (blocks.0.moe .. blocks.7.moe): 64 experts of 1.97 M, 32 on this rank,"
        " 8 per token.",
    ]


HOST = frozenset({"optimizer"})
MEMORY = MemoryPlan(
    Bytes(2**30, 2**29, 3 * 2**30, on_host=HOST),
    Bytes(2**31, 2**30, 6 * 2**30, on_host=HOST),
    Bytes(buffers=2**28),
    None,
)


def test_memory_is_a_table_of_parts_per_rank():
    assert memory_text(MEMORY) == [
        "per rank                               dense  experts   together",
        "weights                              1.0 GiB  2.0 GiB    3.0 GiB",
        "gradients                          512.0 MiB  1.0 GiB    1.5 GiB",
        "optimizer and fp32 weights (host)    3.0 GiB  6.0 GiB    9.0 GiB",
        "communication buffers                                  256.0 MiB",
        "on the device                        1.5 GiB  3.0 GiB    4.8 GiB",
        "Not included: activations, and ZeRO's temporary copies of gradients and, in stage 3,"
        " gathered weights.",
        "The optimizer's own states are unknown and not included.",
    ]


LAYERS = {
    **{
        f"model.decoder.layers.{i}.feed_forward.mixture_of_experts": LayerSize(256, 32, 44.04e6, 8)
        for i in range(58)
    },
    "model.mtp.moe": LayerSize(64, 8, 1e6, 6),
}
LARGE = Summary(ModelSize(5 * 10**9, 0, LAYERS), MEMORY, "256; ZeRO stage 2; bf16-mixed; AdamW.")


def shown(width: int, **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_tables(LARGE, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal_and_cut_no_number(width):
    lines = [line.rstrip() for line in shown(width).splitlines()]
    assert max(map(len, lines)) <= width
    cells = [" ".join(line.split()) for line in lines]
    assert "58 MoE layers 256 32 8 44.04 M 653.91 B 20.43 B" in cells
    assert "1 MoE layer 64 8 6 1.00 M 64.00 M 6.00 M" in cells
    assert "whole model 658.97 B 25.44 B (4%)" in cells
    assert "optimizer and fp32 weights (host) 3.0 GiB 6.0 GiB 9.0 GiB" in cells
    assert "on the device 1.5 GiB 3.0 GiB 4.8 GiB" in cells
    assert "Ranks: 256; ZeRO stage 2; bf16-mixed; AdamW." in lines
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines), "a number was cut"


def test_a_narrow_terminal_gets_plain_text():
    assert shown(60) == plain_text(LARGE)


def test_colours_on_a_terminal_alone():
    assert "\x1b[1m" in shown(80, force_terminal=True)
    assert "\x1b" not in shown(80)
