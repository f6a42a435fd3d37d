"""Models whose experts are offloaded: this package's layers, and one of transformers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE

D_MODEL = 16


def expert(d_model: int, d_ffn: int) -> nn.Module:
    """One that is a module."""
    return nn.Sequential(nn.Linear(d_model, d_ffn), nn.Tanh(), nn.Linear(d_ffn, d_model))


KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid"},
    "expert_choice": {"router": "expert_choice", "top_k": None},
    "cosine": {"router": "cosine"},
    "shared": {"shared_expert": 8, "shared_expert_gate": True},
    "bias": {"bias": True, "activation": "gelu"},
    "few": {"num_experts": 1, "top_k": 1},
    "modules": {"expert": expert},
}


class Blocks(nn.Module):
    """Residual MoE layers that run in an order of their own, each as often as it is named.

    Args:
        options: of the layers.
        order: the layers' numbers.
        count: layers.
        d_model: their width.
    """

    def __init__(
        self,
        options: dict[str, Any],
        order: tuple[int, ...] = (0, 1, 2, 3),
        count: int = 4,
        d_model: int = D_MODEL,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        sizes: dict[str, Any] = {"d_ffn": 8, "num_experts": 4, "top_k": 2, **options}
        self.layers = nn.ModuleList([MoE(d_model, **sizes) for _ in range(count)])
        self.norm = nn.LayerNorm(d_model)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = x + self.layers[number](self.norm(x))
        return x


class Chunkable(nn.Module):
    """Blocks that compute each sequence by itself, as they declare.

    Args:
        options: of the layers.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(layer) for layer in Blocks(options).layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class InChunks(nn.Module):
    """The slow twin: each block of a :class:`Chunkable` computes a chunk after the other.

    Args:
        model: whole.
        size: sequences of a chunk.
    """

    def __init__(self, model: Chunkable, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = torch.cat([block(part) for part in x.split(self.size)])
        return x


class _Block(nn.Module):
    row_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x)
        return out


def poisoned(ring: Any, *, but_whole: bool = False) -> None:
    """Fills each slot with NaN before others' experts are copied there, and the cache now.

    Args:
        ring: to be poisoned.
        but_whole: whether layers that are in slots already are left there.
    """
    filling, copying = ring._fill, ring._copy

    def poison(*memory: Tensor) -> None:
        """On the stream of copies, whose earlier ones may still be reading it."""
        if ring._stream is not None:
            ring._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(ring._stream):
            for part in memory:
                part.view(torch.uint8).fill_(0xFF)

    def fill(layer: int, slot: Any, some: bool) -> None:
        poison(slot.memory)
        filling(layer, slot, some)

    def copy_over(layer: int, slot: Any, *transfer: Any) -> None:
        poison(slot.memory)
        copying(layer, slot, *transfer)

    ring._fill, ring._copy = fill, copy_over
    for slot in [] if but_whole else ring._slots:
        copy_over(slot.layer, slot)
    for rows in [] if ring._cache is None else ring._cache._layers:
        poison(*rows.memory)


def disturbed(offloaded: Any, cycles: int) -> None:
    """As :func:`poisoned`, on a GPU, where each copy begins late, too."""
    ring = offloaded._ring
    poisoned(ring)
    copying = ring._copying

    @contextmanager
    def late(slot: Any) -> Generator[None, None, None]:
        with torch.cuda.stream(ring._stream):
            torch.cuda._sleep(cycles)
        with copying(slot):
            yield

    ring._copying = late


class Scorer(pl.LightningModule):
    """Predicts, validates and tests with :class:`Blocks`."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.network: Blocks | None = None
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.network is None:
            self.network = Blocks(self.options)

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        assert self.network is not None
        out: Tensor = self.network(x)
        return out

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        self.losses.append(self.predict_step(x, batch_idx).square().mean())
        self.log("loss", self.losses[-1])

    test_step = validation_step

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.predict_step(x, batch_idx).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(device_batches: int = 3) -> DataLoader[Tensor]:
    """Batches of 10 and a last one of 7."""
    torch.manual_seed(8)
    return DataLoader(torch.randn(10 * device_batches - 3, D_MODEL), batch_size=10)  # type: ignore[arg-type]


def trainer(strategy: Any, accelerator: str = "cpu", **options: Any) -> pl.Trainer:
    """A quiet Trainer."""
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
