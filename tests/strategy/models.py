"""Small models and data for tests on several ranks, and a plain PyTorch twin of their training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fastmoe import MoE, moe_losses

D_IN, D_MODEL, D_FFN = 6, 12, 20


@dataclass(frozen=True)
class Case:
    """One training run that must come out the same on any topology."""

    world: int = 1
    ep: Any = 1
    stage: int = 2
    accumulate: int = 1
    in_configure_model: bool = False
    clip: float = 0.05
    coefficients: tuple[float, float] = (0.01, 0.001)
    num_experts: tuple[int, ...] = (4, 8)
    precision: str = "32-true"
    steps: int = 3
    tokens: int = 5
    samples_per_batch: int = 2
    accelerator: str = "cpu"
    nodes: int = 1
    shared_gpu: bool = False
    fused: bool = True
    optimizer: str = "AdamW"
    batches_per_epoch: int = 0
    epochs: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


def build_net(num_experts: tuple[int, ...], coefficients: tuple[float, float]) -> nn.ModuleDict:
    """A residual network with MoE layers of different sizes, biases, K and activations."""
    balance, z = coefficients
    moes = [
        MoE(
            D_MODEL,
            D_FFN,
            experts,
            top_k=1 + i % 2,
            bias=i == 0,
            activation=("gelu", "swiglu")[i % 2],
            load_balancing=balance,
            z_loss=z,
        )
        for i, experts in enumerate(num_experts)
    ]
    return nn.ModuleDict(
        {
            "embed": nn.Linear(D_IN, D_MODEL),
            "norm": nn.LayerNorm(D_MODEL),
            "moes": nn.ModuleList(moes),
            "head": nn.Linear(D_MODEL, 1),
        }
    )


def loss_of(net: nn.ModuleDict, batch: Tensor) -> Tensor:
    """Mean squared error against a fixed function of the inputs ``(B, T, D_IN)``."""
    h = net["embed"](batch)
    for layer in net["moes"]:
        h = h + layer(net["norm"](h))
    target = torch.sin(3 * batch.sum(-1, keepdim=True))
    return (net["head"](h) - target).square().mean()


def make_batches(case: Case) -> Tensor:
    """(steps, accumulate, world, B, T, D_IN): the micro-batch of each rank in each step."""
    generator = torch.Generator().manual_seed(3)
    shape = (case.steps, case.accumulate, case.world, case.samples_per_batch, case.tokens, D_IN)
    return torch.randn(shape, generator=generator)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "eps": 1e-3},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "NAdam": {"lr": 1e-3},
}


def make_optimizer(
    net: nn.Module, fused: bool = True, kind: str = "AdamW"
) -> torch.optim.Optimizer:
    """An optimizer of torch's, AdamW by default, with a weight-decay split, as users write it.

    Only AdamW is fused.
    """
    matrices = [p for p in net.parameters() if _rank(p) > 1]
    vectors = [p for p in net.parameters() if _rank(p) <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    options = {**OPTIMIZERS[kind], **({"fused": True} if fused and kind == "AdamW" else {})}
    made: torch.optim.Optimizer = getattr(torch.optim, kind)(groups, **options)
    return made


def _rank(p: nn.Parameter) -> int:
    return len(getattr(p, "ds_shape", p.shape))


def make_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    """A LambdaLR with one function per group, so that a wrong group count would show."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda s: 1.0 / (1 + s), lambda s: 0.5 / (1 + s)]
    )


@dataclass
class Trace:
    """What a run did, in canonical form: experts by global id, whole tensors."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def optimizer_steps(case: Case) -> list[Tensor]:
    """(micro-batches, world, ...) of each optimizer step: an epoch's last may be short."""
    if not case.batches_per_epoch:
        return list(make_batches(case))
    epoch = make_batches(case).flatten(0, 1)[: case.batches_per_epoch]
    return [*epoch.split(case.accumulate)] * case.epochs


def reference(case: Case, net: nn.ModuleDict | None = None) -> Trace:
    """One process, plain PyTorch, terms added by hand, the global batch in one go."""
    pl.seed_everything(7, verbose=False)
    net = net or build_net(case.num_experts, case.coefficients)
    optimizer = make_optimizer(net)
    scheduler = make_scheduler(optimizer)
    trace = Trace()
    for step in optimizer_steps(case):
        optimizer.zero_grad()
        chunks = [b for micro in step for b in micro]
        mean = 0.0
        for chunk in chunks:
            loss = loss_of(net, chunk)
            mean += loss.item() / len(chunks)
            # As Lightning does, also where an epoch ends before `accumulate` is reached.
            share = 1 / (case.world * case.accumulate)
            ((loss + sum(moe_losses(net).values())) * share).backward()
        if not trace.gradients:
            trace.gradients = {
                n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None
            }
        trace.losses.append(mean)
        trace.norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), case.clip)))
        optimizer.step()
        scheduler.step()
        trace.weights.append({n: p.detach().clone() for n, p in net.named_parameters()})
    return trace


class RankBatches(Dataset[Tensor]):
    """This rank's micro-batches, in order."""

    def __init__(self, batches: Tensor) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index]


class Net(pl.LightningModule):
    """The network as a user would write it; nothing of expert parallelism in it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.net: nn.ModuleDict | None = None
        self.batch_losses: list[float] = []
        if not case.in_configure_model:
            self.net = build_net(case.num_experts, case.coefficients)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = build_net(self.case.num_experts, self.case.coefficients)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.batch_losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net, self.case.fused)
        schedule = {"scheduler": make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank = self.trainer.global_rank
        batches = make_batches(self.case)[:, :, rank].flatten(0, 1)
        if self.case.batches_per_epoch:
            batches = batches[: self.case.batches_per_epoch]
        return DataLoader(RankBatches(batches), batch_size=None)
