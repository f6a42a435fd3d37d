"""Measures the time from the command to the first training step, and from the last to the prompt.

    python benchmarks/start_up.py --config examples/gpu_lm.yaml --steps 3

It runs ``lightning-fastmoe fit`` in a process of its own and prints how long each phase took on
rank 0; further arguments are passed on. The device is synchronized after each step, so that a phase
pays for what it queued. A second run is faster, as files and compiled kernels are then cached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).resolve().parents[1]
MARKS = "LIGHTNING_FASTMOE_START_UP_MARKS"
"""The environment variable that names the file for the marks."""

PHASES = {
    "import": "Python starts, packages are imported, the configuration is read",
    "launch": "Trainer and model are created, the other ranks start and meet",
    "build": "this rank's part of the model is built, its weights are drawn",
    "set-up": "DeepSpeed's engine is created and the model moves to the device",
    "before training": "kernels and data are loaded, callbacks begin",
    "first step": "forward, backward and the optimizer, once",
    "other steps": "all further steps, with their validation and checkpoints",
    "end of training": "the callbacks' last work: a checkpoint, a sample",
    "teardown": "the strategy lets go of the device, the process ends",
}
"""Each phase in order, and what happens in it. A mark of its name is made where it ends."""


def mark(phase: str) -> None:
    """Notes that a phase has ended."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and MARKS in os.environ:
        with open(os.environ[MARKS], "a", encoding="utf-8") as file:
            file.write(json.dumps([phase, time.time()]) + "\n")


class Marks(pl.Callback):
    """Marks the phases of a run."""

    def __init__(self) -> None:
        mark("import")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        mark("launch")
        trainer.strategy.before_engine.append(lambda *_: mark("build"))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        mark("set-up")

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            mark("before training")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        mark("first step" if trainer.global_step <= 1 else "other steps")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        mark("end of training")


def durations(start: float, marks: list[tuple[str, float]], end: float) -> dict[str, float]:
    """Seconds of each phase that has a mark; the last mark of a phase counts.

    Raises:
        ValueError: if the run did not finish its first step, or marks are out of order.
    """
    ends = {**dict(marks), "teardown": end}
    if "first step" not in ends:
        raise ValueError("The run ended before its first step.")
    seconds, previous = {}, start
    for phase in (phase for phase in PHASES if phase in ends):
        seconds[phase] = ends[phase] - previous
        if seconds[phase] < 0:
            raise ValueError(f"The phase {phase!r} ended before the one that precedes it.")
        previous = ends[phase]
    return seconds


def table(seconds: dict[str, float]) -> str:
    """The phases as lines of text, with both waits of a user below."""
    lines = [f"{phase:16}{took:8.2f} s   {PHASES[phase]}" for phase, took in seconds.items()]
    waits = waiting(seconds)
    lines += ["", *(f"{name:32}{took:8.2f} s" for name, took in waits.items())]
    return "\n".join(lines)


def waiting(seconds: dict[str, float]) -> dict[str, float]:
    """The time up to the end of the first step, and from the last step to the prompt."""
    phases = list(seconds)
    after = phases.index("other steps" if "other steps" in phases else "first step") + 1
    return {
        "command to first step": sum(seconds[p] for p in phases[: phases.index("first step") + 1]),
        "last step to prompt": sum(seconds[p] for p in phases[after:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="examples/tiny_lm.yaml")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "marks"
        file.touch()
        environment = dict(os.environ)
        environment[MARKS] = str(file)
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-m", "lightning_fastmoe.cli", "fit"]
        command += ["--config", arguments.config, "--trainer.max_steps", str(arguments.steps)]
        command += [*further, "--trainer.callbacks+=benchmarks.start_up.Marks"]
        start = time.time()
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)  # noqa: S603
        end = time.time()
        marks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    seconds = durations(start, [(phase, at) for phase, at in marks], end)
    sys.stdout.write(json.dumps(seconds) if arguments.json else table(seconds))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
