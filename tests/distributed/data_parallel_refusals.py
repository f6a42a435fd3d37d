"""What goes wrong on some ranks of a plain loop, and what each rank then says."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from distributed.devices import join
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed import ExpertDataParallel
from lightning_fastmoe.errors import FastMoEError

D, F = 8, 10


def net(**options: object) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"dense": nn.Linear(D, D), "moe": MoE(D, F, 4, **options)})


def loss_of(model: nn.ModuleDict) -> torch.Tensor:
    return model["moe"](model["dense"](torch.ones(3, D))).square().mean()


def new_parameter(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    if dist.get_rank() == 1:
        model["late"] = nn.Linear(D, D)
    parallel.backward(loss_of(model))
    parallel.reduce_gradients()


def reduced_twice(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    parallel.backward(loss_of(model))
    parallel.reduce_gradients()
    parallel.reduce_gradients()


def reduced_after_each_batch(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    for _ in range(2):
        parallel.backward(loss_of(model), divisor=2)
        parallel.reduce_gradients()


def backward_after_reduction(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    parallel.backward(loss_of(model))
    parallel.reduce_gradients()
    parallel.backward(loss_of(model))
    parallel.clip_grad_norm_(1.0)


def not_set_to_none(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    for _ in range(2):
        parallel.backward(loss_of(model))
        parallel.reduce_gradients()
        model.zero_grad(set_to_none=False)


def stepped_first(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    """The second step without a reduction; weights stay as they were."""
    optimizer = torch.optim.AdamW(model.parameters())
    for reduces in (True, False):
        parallel.backward(loss_of(model))
        if reduces:
            parallel.reduce_gradients()
        before = model["dense"].weight.detach().clone()
        try:
            optimizer.step()
        finally:
            assert torch.equal(model["dense"].weight, before) is not reduces
        optimizer.zero_grad()


def stepped_by_closure(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        parallel.backward(loss)
        return loss

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step(closure)


def unfrozen_and_stepped(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    model["dense"].weight.requires_grad_(False)
    parallel = ExpertDataParallel(model, 2)  # takes over from the first
    model["dense"].weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model["dense"].weight], 0.1)
    for reduces in (True, False):
        parallel.backward(loss_of(model))
        if reduces:
            parallel.reduce_gradients()
        optimizer.step()
        model.zero_grad()


def clipped_first(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    parallel.backward(loss_of(model))
    parallel.clip_grad_norm_(1.0)


def clipped_between(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    for _ in range(2):
        parallel.backward(loss_of(model))
        parallel.clip_grad_norm_(1.0)
        parallel.reduce_gradients()
        model.zero_grad()


def clipped_by_torch(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    """Found one step later: until then nothing is exchanged."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        parallel.backward((1 + dist.get_rank()) * loss_of(model))
        parallel.reduce_gradients()
        assert step == 0
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        weights = [torch.empty_like(model["dense"].weight) for _ in range(2)]
        dist.all_gather(weights, model["dense"].weight.detach())
        assert not torch.equal(*weights)


def skipped_step(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    """As GradScaler does with a rank's own Inf; the step before it is taken by all."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        parallel.backward(loss_of(model))
        parallel.reduce_gradients()
        assert step < 2
        if step == 0 or dist.get_rank() == 0:
            optimizer.step()
        optimizer.zero_grad()


def inside_ddp(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net["moe"](self.net["dense"](x))

    inner = Model()
    wrapper = ExpertDataParallel(inner, 2)
    nn.parallel.DistributedDataParallel(inner)(torch.ones(3, D))
    wrapper.reduce_gradients()


def unknown_scale(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    (loss_of(model) / 2).backward()


def frozen_on_one_rank(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    if dist.get_rank() == 1:
        model["dense"].weight.requires_grad_(False)
    parallel.backward(loss_of(model))
    parallel.reduce_gradients()


def sparse_gradient(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    model["dense"].weight.grad = torch.zeros(D, D).to_sparse()
    parallel.reduce_gradients()


def nonfinite_on_one_rank(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    x = torch.full((3, D), torch.nan if dist.get_rank() == 1 else 1.0)
    parallel.backward(model["moe"](model["dense"](x)).square().mean())
    parallel.reduce_gradients()


def nonfinite_norm(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    parallel.backward(loss_of(model))
    if dist.get_rank() == 1:
        model["moe"].experts.up_proj.grad.view(-1)[0] = torch.inf
    parallel.reduce_gradients()
    parallel.clip_grad_norm_(1.0, error_if_nonfinite=True)


def skipped_layer(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    x = model["dense"](torch.ones(3, D))
    loss = (model["moe"](x) if dist.get_rank() == 0 else x).square().mean()
    parallel.backward(loss)


def saved_before_the_last_batch(model: nn.ModuleDict, parallel: ExpertDataParallel) -> None:
    if dist.get_rank() == 0:
        parallel.backward(loss_of(model))
    parallel.full_state_dict()


def saved_optimizer_before_the_last_batch(
    model: nn.ModuleDict, parallel: ExpertDataParallel
) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    if dist.get_rank() == 0:
        parallel.backward(loss_of(model))
    parallel.full_optimizer_state_dict(optimizer)


DURING = (
    new_parameter,
    reduced_twice,
    reduced_after_each_batch,
    backward_after_reduction,
    not_set_to_none,
    stepped_first,
    stepped_by_closure,
    unfrozen_and_stepped,
    clipped_first,
    clipped_between,
    clipped_by_torch,
    skipped_step,
    inside_ddp,
    unknown_scale,
    frozen_on_one_rank,
    sparse_gradient,
    nonfinite_on_one_rank,
    nonfinite_norm,
    skipped_layer,
    saved_before_the_last_batch,
    saved_optimizer_before_the_last_batch,
)


def fails_in_training(name: str) -> tuple[str, str]:
    """The error of a rank in a loop of two ranks, and its message."""
    join("cpu")
    model = net()
    parallel = ExpertDataParallel(model, 2)
    try:
        globals()[name](model, parallel)
    except (FastMoEError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", ""


def changes_identically(how: str) -> None:
    """Steps by gradients that are changed, identically on all ranks, after they were reduced."""
    join("cpu")
    model = net()
    parallel = ExpertDataParallel(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        parallel.backward(loss_of(model))
        parallel.reduce_gradients()
        weight = model["dense"].weight
        assert weight.grad is not None
        if how == "scaled":
            weight.grad.mul_(0.5)
        elif how == "clipped":
            parallel.clip_grad_norm_(1e-3)
            assert parallel._unreduced.take_found()[0] is None
        elif how == "replaced":
            weight.grad = weight.grad.sign()
        else:
            nn.utils.clip_grad_norm_(model["dense"].parameters(), 1e-3)
        optimizer.step()
        if how == "clipped":
            assert not parallel._unreduced._changes
        optimizer.zero_grad()


def waits_for_nobody(dispatcher: str) -> str:
    """The error of rank 0, whose forward pass rank 1 doesn't join."""
    join("cpu")
    model = net(dispatcher=dispatcher)
    ExpertDataParallel(model, 2, timeout=timedelta(seconds=2))
    error = None
    if dist.get_rank() == 0:
        try:
            loss_of(model)
        except FastMoEError as raised:
            error = raised
    dist.barrier()  # until then rank 1 is neither there nor gone
    return f"{type(error).__name__}: {error}"


def fails_to_wrap(name: str) -> tuple[str, str]:
    """The error of a rank in a loop of two ranks, and its message."""
    join("cpu")
    size, per_node = 2, 2
    model = net(**({"router": "noisy"} if name == "another seed" else {}))
    if name == "another size":
        ExpertDataParallel(model, 2)
        size = 1
    elif name == "indivisible":
        model["odd"] = MoE(D, F, 3)
    elif name == "ranks":
        size = 3
    elif name == "another model" and dist.get_rank() == 1:
        model["dense"] = nn.Linear(D, D, bias=False)
    elif name == "another seed" and dist.get_rank() == 1:
        torch.manual_seed(1)
        model["moe"] = MoE(D, F, 4, router="noisy")
    elif name == "another number":
        torch.manual_seed(0)
        size = "auto"
        model["moe"] = MoE(D, F, 4 if dist.get_rank() == 0 else 3)
    elif name == "another dispatcher" and dist.get_rank() == 1:
        model["moe"] = MoE(D, F, 4, dispatcher="symmetric")
    elif name == "exact on one rank" and dist.get_rank() == 1:
        model["moe"] = MoE(D, F, 4, exact=True)
    elif name == "another size on one rank" and dist.get_rank() == 1:
        size = 1
    elif name == "another node" and dist.get_rank() == 1:
        per_node = 1
    elif name == "tied":
        model["other"] = nn.Linear(D, D)
        model["other"].shared = model["moe"].experts.up_proj
    elif name == "wrapped":
        model = nn.parallel.DistributedDataParallel(model)
    elif name == "meta":
        model["dense"].to("meta")
    elif name == "batch norm":
        model["moe"] = MoE(D, None, 4, expert=lambda d: nn.SyncBatchNorm(d))
    elif name in ("one batch norm", "one nested"):  # in an expert of rank 1
        odd = nn.SyncBatchNorm(D) if name == "one batch norm" else MoE(D, F, 2)
        model["moe"] = MoE(D, None, 2, top_k=1, expert=[nn.Linear(D, D), odd])
    elif name == "only here" and dist.get_rank() == 1:
        model["dense"].shared = model["moe"].experts.up_proj
    elif name == "nested":
        model["moe"] = MoE(D, None, 4, expert=lambda d: MoE(d, F, 2))
    try:
        limit = timedelta(seconds=10)
        ExpertDataParallel(model, size, ranks_per_node=per_node, timeout=limit)
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "", ""
