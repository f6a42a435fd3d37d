"""Training a small Transformer-XL on the ranks of test_training.py, and by a plain loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from strategy.models import make_optimizer
from strategy.tracing import whole_weights
from torch import Tensor

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.demos.byte_lm.data import ByteWindows
from lightning_fastmoe.demos.transformer_xl import ByteStreams, Segment, TransformerXL
from lightning_fastmoe.demos.transformer_xl.network import MoETransformerXL

SEQ_LEN, MEM_LEN, STREAMS, PER_EPOCH, CLIP = 6, 9, 4, 5, 0.05
STEPS = 8
"""More than an epoch, whose end resets the memory."""
SAVED = 3
"""A step within an epoch."""


def write_text(path: Path) -> str:
    """A file whose first half gives each of the streams an epoch of segments."""
    size = STREAMS * PER_EPOCH * SEQ_LEN + 1
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(97, 123, (2 * size,), generator=generator, dtype=torch.uint8)
    path.write_bytes(text.numpy().tobytes())
    return str(path)


class Small(TransformerXL):
    """Also notes losses and what was remembered at each step."""

    def __init__(self) -> None:
        # The load-balancing loss is of each rank's own tokens, so it depends on the ranks.
        sizes = {"d_model": 12, "num_layers": 2, "num_heads": 2, "d_ffn": 8, "num_experts": 4}
        super().__init__(**sizes, mem_len=MEM_LEN, load_balancing=0.0, init_std=0.3)
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.remembered: list[list[Tensor]] = []

    def training_step(self, batch: Segment, batch_idx: int) -> Tensor:
        self.remembered.append([] if batch.starts else [s.clone() for s in self.memory.layers])
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_validation_epoch_end(self) -> None:
        self.val_losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> Any:
        # A large epsilon: AdamW's first steps would turn rounding into the sign of an update.
        return make_optimizer(self.network)


class Observer(pl.Callback):
    """Notes the weights after each step, and saves once."""

    def __init__(self, save_to: str | None) -> None:
        self.save_to, self.weights = save_to, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(whole_weights(pl_module.network))
        if self.save_to is not None and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.save_to)


@dataclass
class Run:
    """What a run did, on one rank or in a plain loop; losses are those of the own streams."""

    losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    remembered: list[list[Tensor]] = field(default_factory=list)


def fit(
    text: str,
    world: int,
    ep: int,
    stage: int,
    *,
    save_to: str | None = None,
    resume: str | None = None,
    seed: int = 7,
    **options: Any,
) -> Run:
    """Trains on this rank."""
    pl.seed_everything(seed, verbose=False)
    module, observer = Small(), Observer(save_to)
    defaults: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 1.0}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(ep, stage=stage),
        max_steps=STEPS,
        gradient_clip_val=CLIP,
        num_sanity_val_steps=0,
        callbacks=[observer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )
    data = ByteStreams(text, SEQ_LEN, STREAMS // world, val_fraction=0.5)
    trainer.fit(module, data, ckpt_path=resume)
    return Run(module.losses, module.val_losses, observer.weights, module.remembered)


def straight_and_resumed(text: str, directory: str, precision: str) -> tuple[Run, Run]:
    """All steps on two ranks, and those after a checkpoint within an epoch."""
    path = str(Path(directory) / "midway.ckpt")
    straight = fit(text, 2, 2, 2, save_to=path, precision=precision)
    return straight, fit(text, 2, 2, 2, resume=path, seed=8, precision=precision)


def plain_network() -> MoETransformerXL:
    """The network of :class:`Small`, with all experts."""
    pl.seed_everything(7, verbose=False)
    module = Small()
    module.configure_model()
    assert module.network is not None
    return module.network


def step_loss(
    network: MoETransformerXL, text: Tensor, index: int, memory: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The loss of segment ``index`` of all streams, (streams,), and the memory after it."""
    length = PER_EPOCH * SEQ_LEN
    starts = [row * length + index * SEQ_LEN for row in range(STREAMS)]
    rows = torch.stack([text[start : start + SEQ_LEN + 1] for start in starts])
    logits, hidden = network(rows[:, :-1], memory)
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].long().flatten(), reduction="none")
    before = memory or [states[:, :0] for states in hidden]
    pairs = zip(before, hidden, strict=True)
    after = [torch.cat((old, new), dim=1)[:, -MEM_LEN:].detach() for old, new in pairs]
    return losses.view(STREAMS, SEQ_LEN).mean(dim=1), after


def halves(text: str) -> tuple[Tensor, Tensor]:
    """The bytes for training and for validation."""
    whole = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8)
    return whole[: len(whole) // 2], whole[len(whole) // 2 :]


def reference(text: str) -> Run:
    """One process in plain PyTorch; the loss of a step is that of all streams."""
    train, val = halves(text)
    assert len(ByteWindows(train, SEQ_LEN)) == STREAMS * PER_EPOCH
    network, run = plain_network(), Run()
    optimizer = make_optimizer(network)
    memory: list[Tensor] = []
    for step in range(STEPS):
        index = step % PER_EPOCH
        if index == 0:
            memory = []
        run.remembered.append(memory)
        optimizer.zero_grad()
        losses, memory = step_loss(network, train, index, memory)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        run.losses.append(losses.mean().item())
        run.weights.append({n: p.detach().clone() for n, p in network.named_parameters()})
        if index % 2 == 1:
            run.val_losses.append(_validate(network, val))
    return run


@torch.no_grad()
def _validate(network: MoETransformerXL, val: Tensor) -> float:
    memory: list[Tensor] = []
    losses = []
    for index in range(PER_EPOCH):
        loss, memory = step_loss(network, val, index, memory)
        losses.append(loss.mean().item())
    return sum(losses) / len(losses)


def fit_and_save(text: str, path: str) -> Run:
    """All steps on two ranks, with a checkpoint within an epoch."""
    return fit(text, 2, 2, 2, save_to=path)


def fit_from(text: str, path: str) -> Run:
    """The steps after that checkpoint, on one rank that has all streams."""
    return fit(text, 1, 1, 2, resume=path, seed=8)
