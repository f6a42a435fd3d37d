"""What the ranks run in test_causal_lm.py and test_padding_and_packing.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from strategy.tracing import whole_weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.huggingface import MoECausalLM, chunked_loss, head
from lightning_fastmoe.nn import MoE, Routing, moe_layers

VOCAB, LENGTH = 61, 9


def batch_of(rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(rank))
    labels = tokens.clone()
    labels[:, :3] = -100
    return {"input_ids": tokens, "labels": labels}


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def finetune(
    weights: str, saved: str, stage: int, lr: float, world: int, **options: Any
) -> tuple[list[float], int]:
    """Two steps on the same batch; returns (losses, experts of the first layer on this rank)."""
    torch.manual_seed(5)
    module, losses = MoECausalLM(weights, lr=lr, load_balancing=0.0, **options), Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(expert_parallel_size=world, stage=stage),
        max_steps=2,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [batch_of(trainer.global_rank)] * 2
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.network is not None
    experts = module.network.model.layers[0].mlp.experts.num_local_experts
    trainer.save_checkpoint(saved)
    return losses.losses, experts


class Small(MoECausalLM):
    """With an optimizer whose steps go with the gradient, also where it is almost zero."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-2)


def uneven_batch(rank: int) -> dict[str, Tensor]:
    """Rank 0 has three rows with little padding, rank 1 two short ones, padded on the left."""
    lengths, width = ((9, 12, 11), 12) if rank == 0 else ((2, 5), 7)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, VOCAB, (len(lengths), width), generator=generator)
    places = torch.arange(width).expand(len(lengths), -1)
    length = torch.tensor(lengths).unsqueeze(1)
    mask = places < length if rank == 0 else places >= width - length
    return {"input_ids": tokens, "attention_mask": mask.long()}


@dataclass
class Trained:
    """What each micro-batch of this rank gave, and the end of the run."""

    losses: list[float] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    routed: list[list[int]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    val_loss: float = 0.0
    chunks: int = 0


class Notes(pl.Callback):
    def __init__(self) -> None:
        self.trained = Trained()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        for name, layer in moe_layers(module):
            if name.endswith("layers.0.mlp"):
                layer.register_routing_observer(self._observe)

    def _observe(self, layer: MoE, routing: Routing) -> None:
        if layer.training:
            self.trained.routed.append(routing.routed_counts().tolist())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        # Lightning has divided it.
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.trained.losses.append(loss)
        layers = moe_layers(module)
        self.trained.terms.append(
            {f"{n} {key}": float(v) for n, layer in layers for key, v in layer.last_losses.items()}
        )


def train_on(
    config: dict[str, Any],
    world: int,
    ep: int,
    stage: int,
    accumulate: int,
    limit: int = head.LIMIT,
) -> Trained:
    """Three steps, in each of which all ranks and micro-batches make up both uneven batches."""
    with patch.object(head, "LIMIT", limit), count_chunks() as chunks:
        trained = _train_on(config, world, ep, stage, accumulate)
    trained.chunks = len(chunks)
    return trained


@contextmanager
def count_chunks() -> Iterator[list[int]]:
    """Lists the positions in each chunk of the loss."""
    chunks: list[int] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(logits: Tensor, *others: Any) -> Any:
            chunks.append(len(logits))
            return original(logits, *others)

        return compute

    with (
        patch.object(chunked_loss, "_loss_and_gradient", counted(chunked_loss._loss_and_gradient)),
        patch.object(chunked_loss, "_losses", counted(chunked_loss._losses)),
    ):
        yield chunks


def _train_on(config: dict[str, Any], world: int, ep: int, stage: int, accumulate: int) -> Trained:
    pl.seed_everything(7, verbose=False)
    module, notes = Small(config=config, load_balancing=0.5, z_loss=0.1), Notes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(expert_parallel_size=ep, stage=stage),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        callbacks=[notes],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    mine = [uneven_batch(rank) for rank in range(2)]
    if world == 2:
        mine = [mine[trainer.global_rank]]
    loader = DataLoader(mine, batch_size=None)
    trainer.fit(module, loader, loader)
    notes.trained.val_loss = float(trainer.callback_metrics["val_loss"])
    notes.trained.weights = whole_weights(module.network)
    return notes.trained
