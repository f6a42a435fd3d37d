"""The benchmark of whole steps: equal training in all rows, FLOPs, and kernels by part."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import train_step
from train_step import table
from training import kernels, rows
from training.shapes import SHAPES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rows_train_the_same_and_are_timed():
    names = ["strategy-compiled", "loop", "transformers"]
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--shape", "tiny", "--steps", "8"]
    done = subprocess.run(
        [*command, "--warm-up", "2", "--rows", *names],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["row"] for one in found] == names
    for one in found:
        assert one["last_loss"] < one["first_loss"]
        assert one["quartiles_ms"][0] <= one["ms"] <= one["quartiles_ms"][1]
    lines = done.stdout.splitlines()[-len(names) :]
    for line, one in zip(lines, found, strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[1] == one["row"]
        expected = 1000 * SHAPES["tiny"].tokens / one["ms"]
        assert float(cells[3].replace(",", "")) == pytest.approx(expected, rel=1e-3, abs=0.5)


def run_of(row: str, **fields: object) -> dict[str, object]:
    return {"row": row, "ms": 10.0, "first_loss": 5.0, "last_loss": 4.0, **fields}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (run_of("b"), True),
        (run_of("b", first_loss=5.3), False),
        (run_of("b", last_loss=4.3), False),
        ({"row": "b", "error": "OutOfMemoryError"}, False),
        ({"row": "b", "missing": "not installed: peft"}, True),
    ],
)
def test_what_trains_otherwise_is_not_compared(other, same):
    assert table([run_of("a"), other], SHAPES["tiny"])[1] is same


def test_what_is_not_installed_is_told(monkeypatch, capsys):
    monkeypatch.setitem(rows.ROWS, "other", replace(rows.ROWS["peft-lora"], needs="no_such_module"))
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--shape", "tiny", "--rows", "other"])
    with pytest.raises(SystemExit, match="1"):  # nothing was trained
        train_step.main()
    shown = capsys.readouterr().out
    assert '{"row": "other", "missing": "not installed: no_such_module"}' in shown
    assert "| other | not installed: no_such_module |" in shown


def test_flops_count_each_weight_that_a_token_meets():
    shape = SHAPES["tiny"]
    model = rows.ours(shape)
    met = 0.0
    for name, parameter in model.named_parameters():
        if "experts" in name:
            met += parameter.numel() * shape.top_k / shape.num_experts
        elif parameter.dim() > 1 and "embed" not in name:
            met += parameter.numel()
    # Of two products of width heads * head_dim with half a sequence, and twice that backward.
    positions = 3 * 2 * 2 * shape.heads * shape.head_dim * shape.seq_len / 2
    assert shape.flops_per_token() == 6 * met + shape.layers * positions


def test_kernels_are_split_by_name_and_gaps_are_idle():
    found = kernels.split(
        [
            ("void lightning_fastmoe::hopper::up_forward<...>", 1000.0, 3000.0),
            ("flash_fwd_kernel", 3000.0, 3500.0),
            ("ncclDevKernel_AllReduce", 3200.0, 3400.0),  # beside the one before
            ("nvjet_sm90_tst_128x256", 4500.0, 4750.0),
            ("FusedAdamMathFunctor", 4750.0, 5250.0),
            ("lightning_fastmoe::adam_step_kernel<...>", 5250.0, 5750.0),
            ("vectorized_elementwise_kernel", 5750.0, 5850.0),
            ("Memcpy DtoD", 5850.0, 5900.0),
        ]
    )
    assert found == {
        "expert layers": 2.0,
        "attention": 0.5,
        "communication": 0.2,
        "GEMMs": 0.25,
        "optimizer": 1.0,
        "elementwise and reductions": 0.1,
        "copies and fills": 0.05,
        "idle": 1.0,
    }


def test_the_longest_gaps_are_listed_in_their_order():
    ran = [("a", 0.0, 1000.0), ("b", 500.0, 800.0), ("c", 1500.0, 1600.0), ("d", 1700.0, 2000.0)]
    ran.append(("e", 5000.0, 5001.0))
    assert kernels.gaps(ran, 2) == [
        "    0.500 idle at    1.00, before c",
        "    3.000 idle at    2.00, before e",
    ]
