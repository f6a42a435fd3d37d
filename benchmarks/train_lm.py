"""Measures tokens per second and peak memory of training the example language model.

    python benchmarks/train_lm.py --config examples/gpu_lm.yaml --steps 100

Further arguments are passed to ``lightning-fastmoe fit``. Each step is timed from the end of the
previous one with the device synchronized, including data loading and the optimizer step; the median
excludes the first ten. Blocks are not compiled. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import deepspeed
import pytorch_lightning as pl
import torch

from lightning_fastmoe.demos.byte_lm import ByteCorpus, MoELanguageModel
from lightning_fastmoe.demos.byte_lm.cli import FastMoECLI, silence_upstream

WARM_UP = 10


class StepTimer(pl.Callback):
    """Records when each step ends, its loss, and the peak device memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens_per_rank = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(float(outputs["loss"]))
        tensor = batch[0] if isinstance(batch, list | tuple) else batch
        # A window holds its inputs and, one byte on, its targets.
        self.tokens_per_rank = tensor.shape[0] * (tensor.shape[1] - 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][WARM_UP:]
        median = statistics.median(steps)
        cuda = torch.cuda.is_available()
        report = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "ranks": trainer.world_size,
            "expert_parallel_size": trainer.strategy.expert_mesh.ep_size,
            "stage": trainer.strategy.config["zero_optimization"]["stage"],
            "precision": str(trainer.precision),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in pl_module.parameters()),
            "steps": len(self.ends),
            "median_step_s": round(median, 4),
            "tokens_per_s": round(self.tokens_per_rank * trainer.world_size / median),
            "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
            "deepspeed": deepspeed.__version__,
        }
        if trainer.is_global_zero:
            print(json.dumps(report), flush=True)


def main() -> None:
    """Trains without validation and prints the report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", default="examples/gpu_lm.yaml")
    parser.add_argument("--steps", type=int, default=100)
    known, rest = parser.parse_known_args()
    silence_upstream()
    arguments = ["fit", "--config", known.config, "--trainer.max_steps", str(known.steps)]
    arguments += ["--model.compile", "false", "--trainer.limit_val_batches", "0", *rest]
    try:
        FastMoECLI(
            MoELanguageModel,
            ByteCorpus,
            trainer_defaults={"callbacks": [StepTimer()]},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            args=arguments,
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or NCCL warns at exit


if __name__ == "__main__":
    main()
