"""The group of verbs: help, arguments, exit statuses, a quick start; and inspect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios

import pytest
from checkpoint.samples import write_sample

from lightning_fastmoe.cli import main
from lightning_fastmoe.cli.checkpoint import VERBS
from lightning_fastmoe.cli.checkpoint.console import print_json, readable, size_in_bytes


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


def exit_status(*words) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["checkpoint", *words])
    return exit_.value.code


def test_help_lists_verbs_and_statuses(capsys):
    assert exit_status("--help") == 0
    text = capsys.readouterr().out
    assert all(f"    {name}" in text for name in VERBS)
    for status in ("  0    ", "  1    ", "  2    ", "  3    ", "  130  "):
        assert status in text


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    assert exit_status(verb, "--help") == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert len(text.splitlines()) > 8
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("words", [[], ["destroy"], ["inspect"], ["inspect", "a", "--frob"]])
def test_wrong_arguments(words, capsys):
    assert exit_status(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_inspect_summarises_topology_layers_and_files(path, capsys):
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["epoch"], summary["global_step"]) == (1, 3)
    assert summary["topology"] == {
        "world_size": 2,
        "expert_parallel_size": 1,
        "zero_stage": 2,
        "precision": "32-true",
    }
    (layer,) = summary["moe_layers"]
    assert layer["name"] == "moe"
    assert layer["num_experts"] == 4
    assert layer["experts"] == {"up_proj": {"dtype": "F32", "shape": [4, 3, 2], "bytes": 96}}
    assert summary["weights"]["elements"] == 35 + 24 + 9 + 11 + 1
    assert summary["weights"]["bytes"] == 4 * 35 + 4 * 24 + 2 * 9 + 11 + 8
    assert summary["optimizer"]["exp_avg"] == {"tensors": 1, "elements": 35, "bytes": 140}
    on_disk = {f.name: f.stat().st_size for f in path.iterdir() if f.name[:8] != "manifest"}
    assert summary["files"] == on_disk
    assert summary["bytes"] == sum(on_disk.values())
    assert "tensors" not in summary
    assert main(["checkpoint", "inspect", str(path), "--json", "--tensors"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert tensors["weights/half"] == {"dtype": "BF16", "shape": [9], "bytes": 18, "pieces": 2}


def test_inspect_for_people(path, capsys):
    assert main(["checkpoint", "inspect", str(path), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "epoch 1, step 3" in text
    assert "2 ranks, expert parallel size 1, ZeRO stage 2" in text
    assert "up_proj F32 4x3x2" in text
    assert "optimizer/exp_avg/head.weight" in text


def test_inspect_of_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "has no manifest.json" in err
    assert main(["checkpoint", "inspect", str(tmp_path), "--json"]) == 3
    assert "has no manifest.json" in json.loads(capsys.readouterr().out)["error"]


def test_inspect_of_a_directory_of_checkpoints(path, capsys):
    (path.parent / "unfinished").mkdir()
    assert main(["checkpoint", "inspect", str(path.parent)]) == 3
    err = capsys.readouterr().err
    assert f"a directory of 1: {path.name}. Choose one of them." in err
    assert "has no manifest" not in err


START = """
import sys
sys.argv[0] = "lightning-fastmoe"
from lightning_fastmoe.cli import main
status = main(sys.argv[1:])
heavy = {"pytorch_lightning", "lightning_fabric", "deepspeed", "transformers"}
print("LOADED", sorted(heavy & sys.modules.keys()), file=sys.stderr)
sys.exit(status)
"""


def test_verbs_start_without_lightning_and_deepspeed(path, tmp_path):
    for words in (["verify", path], ["consolidate", path, tmp_path / "m.pt"], ["inspect", path]):
        command = [sys.executable, "-c", START, "checkpoint", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "LOADED []" in done.stderr


def test_a_bar_on_terminals_only(path):
    terminal, side = os.openpty()
    termios.tcsetwinsize(side, (24, 80))
    command = [sys.executable, "-c", START, "checkpoint", "verify", str(path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=side, text=True, timeout=60, check=False
    )
    os.close(side)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert done.returncode == 0
    assert "verifying" in shown
    assert "experts: 4 in 1 layer" in done.stdout


def test_ctrl_c_exits_with_130(path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_fastmoe.checkpoint.tools.verify.Audit.damages", interrupt)
    assert main(["checkpoint", "verify", str(path)]) == 130


def test_sizes_are_written_and_read_with_units():
    assert [readable(n) for n in (0, 1023, 1536, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 TiB",
    ]
    assert [size_in_bytes(s) for s in ("7", "2KB", "1.5MiB")] == [7, 2000, 1572864]
    for wrong in ("0", "-1", "5XB", "GB"):
        with pytest.raises(ValueError, match=r".*"):
            size_in_bytes(wrong)


def test_json_has_no_nan(capsys):
    print_json({"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"a": ["nan", 1.5], "b": "inf"}
