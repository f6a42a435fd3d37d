"""examples/finetune_chat.py: a model on disk learns to answer, and transformers loads it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from demos.chat_tokenizer import tokenizer_with
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


def sums(count: int, first: int) -> str:
    """Lines of chats about a number and the next."""
    lines = []
    for i in range(first, first + count):
        asked = {"role": "user", "content": f"{i % 10}+1?"}
        answer = {"role": "assistant", "content": str(i % 10 + 1)}
        lines.append(json.dumps({"messages": [asked, answer]}))
    return "\n".join(lines)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "finetune_chat.py"), *arguments]
    return subprocess.run(
        [*command, "--devices", "2", "--seq-len", "128", "--batch-size", "2", "--lr", "3e-3"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    rows = []
    for version in sorted(folder.glob("version_*")):
        rows += list(csv.DictReader((version / "metrics.csv").open()))
    return [float(row["val_loss"]) for row in rows if row.get("val_loss")]


def test_a_model_on_disk_learns_to_answer(tmp_path: Path) -> None:
    """Under ZeRO 3, in two runs, the second of which resumes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 48}
    config = AutoConfig.for_model("qwen3_moe", **sizes, num_experts=8, vocab_size=320)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer_with().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(sums(200, 0))
    (tmp_path / "val.jsonl").write_text(sums(20, 3))
    arguments = ["model", "train.jsonl", "--val", "val.jsonl", "--stage", "3"]
    for epochs, more in (("3", []), ("6", ["--resume", "--output", "again"])):
        if more:
            (tmp_path / "tuned.run").rename(tmp_path / "again.run")
        done = run(tmp_path, *arguments, "--epochs", epochs, "--warmup-steps", "4", *more)
        assert done.returncode == 0, done.stderr[-3000:]
    found = losses(tmp_path / "again.run")
    assert len(found) == 6
    assert found[-1] < 0.5 < 2 < found[0]
    assert sorted(found, reverse=True) == found
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.dtype == torch.bfloat16
    right = 0
    for i in range(10):
        chat = [{"role": "user", "content": f"{i}+1?"}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        answer = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        right += tokenizer.decode(answer[0, ids.shape[1] :]).startswith(str(i + 1))
    assert right >= 7


def test_an_output_that_exists_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    done = run(tmp_path, "model", "train.jsonl")
    assert done.returncode == 2
    assert "tuned exists already" in done.stderr
