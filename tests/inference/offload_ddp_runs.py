"""What each rank does in the tests of OffloadDDPStrategy."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from inference.offload_models import D_MODEL, KINDS, Blocks, Chunkable, InChunks, poisoned
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import OffloadDDPStrategy
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.gathered import PARTS, GatheringRing
from lightning_fastmoe.inference.offloadable import offloadable_parameters
from lightning_fastmoe.inference.shared import SharedExperts

IN_ORDER = (0, 1, 2, 3)


class Seen(pl.LightningModule):
    """Keeps what it computed; rank 0's weights are those of ``Blocks({})``, other ranks' not.

    Args:
        orders: of each rank's layers.
        early: whether the model is built in ``__init__``.
        at: called at the begin of each step with its number.
    """

    def __init__(
        self,
        orders: tuple[tuple[int, ...], ...] = (IN_ORDER, IN_ORDER),
        early: bool = False,
        at: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.orders, self.at = orders, at
        self.network: Any = None
        self.seen: list[tuple[Tensor, Tensor]] = []
        if early:
            self.network = Blocks({})

    def configure_model(self) -> None:
        rank = self.trainer.global_rank
        if self.network is None:
            self.network = Blocks({})
        self.network.order = self.orders[rank]
        if rank:
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.add_(rank)

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        if self.at is not None:
            self.at(batch_idx)
        out: Tensor = self.network(x)
        self.seen.append((x, out))
        return out

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        self.log("loss", self.predict_step(x, batch_idx).mean(), sync_dist=True)


def data(samples: int) -> DataLoader[Tensor]:
    """Batches of 5."""
    torch.manual_seed(8)
    return DataLoader(torch.randn(samples, D_MODEL), batch_size=5)  # type: ignore[arg-type]


def own(accelerator: str = "cpu", **options: Any) -> pl.Trainer:
    """A Trainer on two ranks."""
    options = {"report": False, **options}
    return pl.Trainer(
        accelerator=accelerator,
        devices=2,
        strategy=OffloadDDPStrategy(**options),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def fill_with_nan(ring: Any, slot: Any) -> None:
    """Where copies are made: the other rank may still be getting its part of the slot."""
    if ring._stream is None:
        slot.memory.fill_(0xFF)
        return
    ring._stream.wait_stream(torch.cuda.current_stream(slot.memory.device))
    with torch.cuda.stream(ring._stream):
        slot.memory.fill_(0xFF)


def poison(trainer: pl.Trainer) -> Callable[[int], None]:
    """Fills each slot with NaN before what is copied there."""

    def at(step: int) -> None:
        ring = trainer.strategy.offloaded.ring  # type: ignore[attr-defined]
        if ring is None or hasattr(ring, "poisoned"):
            return
        ring.poisoned, copying = True, ring._copy

        def copy_over(layer: int, slot: Any, *transfer: Any) -> None:
            fill_with_nan(ring, slot)
            copying(layer, slot, *transfer)

        ring._copy = copy_over

    return at


def checked(module: Seen, found: Any, weights: Blocks) -> list[Tensor]:
    """The samples that a rank predicted, all with the bits of the whole model."""
    weights.order = module.network.order
    with torch.inference_mode():
        for x, out in module.seen:
            assert torch.equal(weights(x), out)
    module.seen.clear()
    return [x for batch in found for x in batch]


def predictions(
    samples: int, orders: Any, options: dict[str, Any], early: bool, accelerator: str = "cpu"
) -> list[Any]:
    """Two calls of predict; of each the batches, samples, and exchanges that were joined."""
    run = own(accelerator, **options)
    module = Seen(orders, early=early)
    at = poison(run)
    counts: list[Any] = []

    def look(step: int) -> None:
        at(step)
        if step == 0:
            ring = run.strategy.offloaded.ring  # type: ignore[attr-defined]
            counts.append(ring)

    module.at = look
    result = []
    for _ in range(2):
        found = run.predict(module, data(samples))
        assert found is not None
        checked(module, found, Blocks({}).eval().to(run.strategy.root_device))
        result.append((len(found), sum(map(len, found)), counts[-1]._joined))  # type: ignore[arg-type]
    return result


class Generating(Seen):
    """In each step a pass of all samples, then three of one, as in generation."""

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        out = super().predict_step(x, batch_idx)
        for _ in range(3):
            one = torch.randn(1, D_MODEL).to(x.device)
            self.seen.append((one, self.network(one)))
        return out


def few_tokens(options: dict[str, Any], accelerator: str = "cpu") -> tuple[int, int, int]:
    """Rank 0's last batch has one sample, rank 1's five; returns exchanges, hits and misses."""
    run = own(accelerator, **options)
    module = Generating()
    rings: list[Any] = []

    def look(step: int) -> None:
        if not rings:
            rings.append(run.strategy.offloaded.ring)  # type: ignore[attr-defined]
            poisoned(rings[0], but_whole=True)

    module.at = look
    found = run.predict(module, data(31))
    checked(module, found, Blocks({}).eval().to(module.seen[0][0].device))
    statistics = rings[0].statistics
    return rings[0]._joined, statistics.expert_hits, statistics.expert_misses


class InBlocks(Seen):
    """With blocks that compute each sequence by itself."""

    def configure_model(self) -> None:
        if self.network is None:
            self.network = Chunkable(KINDS["softmax"])


def chunks(gather: bool, accelerator: str = "cpu") -> list[int]:
    """Batches of 5 in chunks of 2, then of 1, which is few; returns tokens of each timed pass."""
    run = own(accelerator, chunk_sequences=2, gather=gather, report=True)
    module = InBlocks()
    module.at = poison(run)
    run.predict(module, data(31))
    twin = InChunks(Chunkable(KINDS["softmax"]).eval(), 2).to(module.seen[0][0].device)
    with torch.inference_mode():
        for x, out in module.seen:
            assert torch.equal(twin(x), out)
    report = run.strategy.last_report  # type: ignore[attr-defined]
    return [one.tokens for one in report.passes]


def validation(samples: int) -> float:
    """A mean over ranks, reduced in each step."""
    (metrics,) = own().validate(Seen(), data(samples), verbose=False)
    return float(metrics["loss"])


def memory() -> dict[str, Any]:
    """Where the experts are in a pass and after it, whose writes are a rank's own."""
    found: dict[str, Any] = {}
    run, module = own(), Seen()

    def look(step: int) -> None:
        maps = Path("/proc/self/maps").read_text("ascii").splitlines()
        rows = [row.split() for row in maps if "lightning_fastmoe_experts" in row]
        found["files"] = {(row[4], row[1]) for row in rows}
        spans = [tuple(int(x, 16) for x in row[0].split("-")) for row in rows]
        found["inside"] = all(
            any(a <= p.data_ptr() < b for a, b in spans)
            for layer in module.network.layers
            for p in layer.experts.parameters()
        )
        found["outside"] = any(a <= module.network.norm.weight.data_ptr() < b for a, b in spans)

    module.at = look
    run.predict(module, data(20))
    weight = next(module.network.layers[0].experts.parameters())
    right = next(Blocks({}).layers[0].experts.parameters())  # type: ignore[union-attr, operator]
    found["kept"] = torch.equal(weight, right)
    before = found["files"]
    if dist.get_rank() == 1:
        with torch.no_grad():
            weight.add_(1)  # its own, which the next call gives up for rank 0's
    checked(module, run.predict(module, data(20)), Blocks({}).eval())
    found["again"] = found["files"] == before
    with torch.no_grad():
        weight.add_(1 + dist.get_rank())
    dist.barrier()
    found["own"] = torch.equal(weight, right + (1 + dist.get_rank()))
    module.at = None
    module.seen.clear()
    outs = run.predict(module, data(20))  # with what rank 0 has written
    assert outs is not None
    other = Blocks({}).eval()
    with torch.no_grad():
        next(other.layers[0].experts.parameters()).add_(1)  # type: ignore[union-attr, operator]
    checked(module, outs, other)
    return found


def loaded(path: str) -> bool:
    """Weights of a checkpoint, which all ranks write to the same memory."""
    run, module = own(), Seen()
    other = Blocks({}).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    file = f"{path}/other.ckpt"
    if run.global_rank == 0:
        state = {f"network.{name}": value for name, value in other.state_dict().items()}
        torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__}, file)
    found = run.predict(module, data(20), ckpt_path=file)
    checked(module, found, other)
    return True


class Failing(Seen):
    """Rank 1 fails in a phase."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def configure_model(self) -> None:
        if self.phase == "build" and self.trainer.global_rank == 1:
            raise RuntimeError("rank 1 can't")
        super().configure_model()
        if self.phase == "other" and self.trainer.global_rank == 1:
            self.network = Blocks({"num_experts": 2})
        if self.phase == "rest" and self.trainer.global_rank == 1:
            self.network.norm = torch.nn.LayerNorm(D_MODEL, bias=False)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.predict_step(x, batch_idx).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        if self.phase == "change" and batch_idx == 1:
            with torch.no_grad():
                for parameter in self.network.layers.parameters():
                    parameter.add_(1)
        if self.phase == "step" and self.trainer.global_rank == 1 and batch_idx == 1:
            raise RuntimeError("rank 1 can't")
        return super().predict_step(x, batch_idx)


def failing(phase: str) -> None:
    """Must raise on both ranks."""
    run = own()
    (run.fit if phase == "fit" else run.predict)(Failing(phase), data(20))


def ring(device_type: str, cycles: int) -> tuple[int, int]:
    """A ring without Lightning: poisoned slots, and copies that begin late, others on each rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    model = Blocks({}).eval().requires_grad_(False)
    whole = Blocks({}).eval().requires_grad_(False).to(device)
    where: list[Any] = [None]
    if rank == 0:
        shared = SharedExperts(offloadable_parameters(model), PARTS * world)
        where = [shared.shared]
    dist.broadcast_object_list(where, 0, device=device)
    if rank:
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.zero_()
        shared = SharedExperts(offloadable_parameters(model), PARTS * world, where[0])
    model.load_state_dict(whole.state_dict())  # routers; the experts are the same already
    make = partial(GatheringRing, regions=shared.regions, group=dist.new_group())
    with torch.inference_mode():
        offloaded = offload_experts(model, device, make_ring=make)
        ring: Any = offloaded.ring
        copying, passes = ring._copy, 0

        def late(layer: int, slot: Any, *transfer: Any) -> None:
            fill_with_nan(ring, slot)
            if cycles:
                with torch.cuda.stream(ring._stream):
                    torch.cuda._sleep(cycles * (1 + 3 * (rank == passes % world)))
            copying(layer, slot, *transfer)

        ring._copy = late
        for passes in range(6):
            whole.order = model.order = (3, 0, 0, 2) if rank and passes == 4 else IN_ORDER
            x = torch.randn(30 * passes + 10 * rank, D_MODEL, device=device)
            right = whole(x)
            with ring.one_pass():
                assert torch.equal(model(x), right)
    counts = (ring._joined, ring.statistics.misses)
    offloaded.close()
    shared.part()
    dist.barrier()
    return counts
