"""Training on one device, in this process, for test_monitoring.py."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fastmoe import FastMoEStrategy, MoE, MoESummary, ThroughputMonitor
from lightning_fastmoe.planning.memory import MemoryPlan

ACCELERATOR = "cuda"
D_IN = 16
BUCKET = 40_000_000
"""Elements of a communication bucket."""
STEPS, WINDOW = 24, 12


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batches."""

    d_model: int
    d_ffn: int
    num_experts: int
    num_layers: int
    tokens: int
    top_k: int = 2

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.d_model * self.d_ffn

    @property
    def dense(self) -> int:
        """Parameters outside of experts."""
        layer = self.d_model * self.d_model + self.num_experts * self.d_model
        return (D_IN + 1) * self.d_model + self.num_layers * layer


# 200 M parameters in experts and few tokens: what is allocated are the model and its states.
HEAVY = Sizes(d_model=1024, d_ffn=2048, num_experts=8, num_layers=4, tokens=64)
# Many tokens: time goes into the experts.
BUSY = Sizes(d_model=1024, d_ffn=4096, num_experts=8, num_layers=1, tokens=16_384)


class Repeated(Dataset[Tensor]):
    """One batch, again and again."""

    def __init__(self, batch: Tensor, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


class Model(pl.LightningModule):
    """Dense and MoE layers in turn, without biases."""

    def __init__(self, sizes: Sizes, steps: int) -> None:
        super().__init__()
        self.sizes, self.steps = sizes, steps
        width = sizes.d_model
        self.embed = nn.Linear(D_IN, width, bias=False)
        self.dense = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(sizes.num_layers)
        )
        self.moes = nn.ModuleList(
            MoE(width, sizes.d_ffn, sizes.num_experts, sizes.top_k) for _ in range(sizes.num_layers)
        )
        self.head = nn.Linear(width, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = self.embed(batch)
        for dense, moe in zip(self.dense, self.moes, strict=True):
            h = h + moe(dense(h))
        return self.head(h).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    def train_dataloader(self) -> DataLoader[Tensor]:
        batch = torch.randn(4, self.sizes.tokens // 4, D_IN)
        return DataLoader(Repeated(batch, self.steps), batch_size=None)


def fit(
    sizes: Sizes, steps: int, stage: int, precision: str, callbacks: list[Any], logger: Any
) -> None:
    """Trains, and lets go of all that it allocated."""
    pl.seed_everything(3, verbose=False)
    model = Model(sizes, steps)
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        strategy=FastMoEStrategy(1, stage=stage, reduce_bucket_size=BUCKET),
        precision=precision,
        max_steps=steps,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model)


@dataclass
class Allocated(pl.Callback):
    """Bytes that torch had allocated beyond what it had before.

    Attributes:
        before: when the callback was made.
        held: between the backward pass and the optimizer's step.
        peak: the most in forward and backward, of a step whose optimizer has its states.
    """

    before: int = 0
    held: int = 0
    peak: int = 0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step < 2:
            return
        torch.cuda.synchronize()
        self.held = max(self.held, torch.cuda.memory_allocated() - self.before)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self.before)


def allocate(stage: int, precision: str) -> tuple[MemoryPlan, int, int]:
    """What MoESummary says before the fit, and what is held and the peak while it goes on."""
    gc.collect()
    torch.cuda.empty_cache()
    # cuBLAS keeps a workspace, which is not part of the model.
    square = torch.ones(64, 64, device=ACCELERATOR, dtype=torch.bfloat16)
    torch.mm(square, square)
    summary, allocated = MoESummary(), Allocated(before=torch.cuda.memory_allocated())
    fit(HEAVY, 4, stage, precision, [summary, allocated], False)
    assert summary.memory is not None
    return summary.memory, allocated.held, allocated.peak


class Memory(DummyLogger):
    """Keeps what was logged last under each name."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.logged.update(metrics)


class Clock(pl.Callback):
    """The device's own time from the first to the last batch of the monitor's last window."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, idx: int) -> None:
        if idx in (STEPS - WINDOW, STEPS - 1):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)

    def seconds(self) -> float:
        """Once the fit is over."""
        torch.cuda.synchronize()
        first, last = self.events
        return float(first.elapsed_time(last)) / 1000


def throughput() -> tuple[dict[str, float], int, float]:
    """What the monitor logged, the peak that it measured, and seconds per batch by events."""
    logger, clock = Memory(), Clock()
    monitor = ThroughputMonitor(peak_flops="measured", window_size=WINDOW)
    fit(BUSY, STEPS, 2, "bf16-mixed", [monitor, clock], logger)
    assert monitor.available_flops is not None
    return logger.logged, monitor.available_flops, clock.seconds() / (WINDOW - 1)
