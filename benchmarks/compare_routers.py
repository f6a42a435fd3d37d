"""Routers side by side on the example language model: validation bits per byte and load.

    python benchmarks/compare_routers.py --steps 80

Trains ``--config`` once per router, each in a separate process on the CPU or one GPU, with the same
data, seed, learning rate and number of steps; prints a Markdown table. The loads are from the last
logging step, over all layers. Further arguments are passed to ``lightning-fastmoe fit``. A short
run shows how training starts with a router, not how it ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import pytorch_lightning as pl

from lightning_fastmoe import RouterBiasBalancing
from lightning_fastmoe.demos.byte_lm import ByteCorpus, MoELanguageModel
from lightning_fastmoe.demos.byte_lm.cli import FastMoECLI, silence_upstream

RUNS: dict[str, tuple[str, int | None, dict[str, Any], float]] = {
    "softmax": ("softmax", 2, {}, 0.0),
    "softmax, no loss": ("softmax", 2, {"load_balancing": 0.0}, 0.0),
    "softmax, balance bias, no loss": (
        "softmax",
        2,
        {"load_balancing": 0.0, "router_options": {"balance_bias": True}},
        0.003,
    ),
    "softmax, capacity 1.0": ("softmax", 2, {"capacity_factor": 1.0}, 0.0),
    "noisy": ("noisy", 2, {}, 0.0),
    "switch": ("switch", 1, {}, 0.0),
    "gshard": ("gshard", 2, {}, 0.0),
    "sigmoid, balance bias": ("sigmoid", 2, {"load_balancing": 0.0}, 0.003),
    "cosine": ("cosine", 2, {}, 0.0),
    "hash": ("hash", 2, {}, 0.0),
    "base": ("base", 1, {}, 0.0),
    "sinkhorn": ("sinkhorn", 2, {}, 0.0),
    "swipe, 4 groups": ("swipe", 2, {"router_options": {"num_groups": 4}}, 0.0),
    "expert_choice (sees the future)": ("expert_choice", None, {}, 0.0),
    "soft (sees the future)": ("soft", None, {"router_options": {"slots_per_expert": 16}}, 0.0),
}
"""Name -> router, top_k, arguments of the layer, update rate of the balance bias."""


class Report(pl.Callback):
    """Records the validation result, the loads and the time."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.start = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.found["seconds"] = time.perf_counter() - self.start

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        loads = [v for k, v in metrics.items() if k.endswith("/load_cv")]
        dead = [v for k, v in metrics.items() if k.endswith("/dead_experts")]
        self.found["bits_per_byte"] = metrics["val_bpb"]
        self.found["load_cv"] = sum(loads) / len(loads)
        self.found["dead"] = sum(dead)


def train(name: str, config: str, steps: int, rest: list[str]) -> None:
    """Trains with one router; prints one line of JSON."""
    router, top_k, layer, rate = RUNS[name]
    layer = dict(layer)
    losses = {k: layer.pop(k) for k in ("load_balancing",) if k in layer}
    report = Report()
    callbacks = [report, *([RouterBiasBalancing(rate)] if rate else [])]
    silence_upstream()
    arguments = ["fit", "--config", config, "--model.router", router]
    arguments += ["--model.top_k", "null" if top_k is None else str(top_k)]
    arguments += ["--model.moe", json.dumps(layer)] if layer else []
    for loss, value in losses.items():
        arguments += [f"--model.{loss}", str(value)]
    arguments += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    arguments += ["--trainer.devices", "1", "--trainer.logger", "false"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.enable_checkpointing", "false"]
    arguments += ['--trainer.callbacks=[{"class_path": "lightning_fastmoe.ExpertLoadMonitor"}]']
    FastMoECLI(
        MoELanguageModel,
        ByteCorpus,
        trainer_defaults={"callbacks": callbacks},
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=[*arguments, *rest],
    )
    print(json.dumps(report.found), flush=True)


def main() -> None:
    """Trains with every router and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", default="examples/tiny_lm.yaml")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", choices=list(RUNS), help="one router, as JSON")
    known, rest = parser.parse_known_args()
    if known.only:
        train(known.only, known.config, known.steps, rest)
        return
    print("| router | K | bits per byte | load CV | dead experts | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, (_, top_k, _, _) in RUNS.items():
        command = [sys.executable, __file__, "--config", known.config, "--steps", str(known.steps)]
        done = subprocess.run(  # noqa: S603  this file itself
            [*command, "--only", name, *rest], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {name} | {top_k or '-'} | {found['bits_per_byte']:.3f} | {found['load_cv']:.2f}"
            f" | {found['dead']:.0f} | {found['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
