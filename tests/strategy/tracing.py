"""Running a case under FastMoEStrategy on this rank, and collecting what it did."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from strategy.models import Case, Net, Trace, make_optimizer, make_scheduler
from torch import Tensor

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.distributed import schedule
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.zero import weight_gather


def run_case(case: Case, kind: type[Net] | None = None) -> Trace:
    """Trains ``case`` on this rank; the traces of all ranks are alike but for the losses."""
    pl.seed_everything(7, verbose=False)
    module = (kind or Net)(case)
    tracer = Tracer()
    trainer = make_trainer(case, callbacks=[tracer])
    trainer.fit(module)
    trace = tracer.trace
    trace.losses = global_losses(module, case, trainer.strategy.root_device)
    trace.gradients = {name: g.cpu() for name, g in trace.gradients.items()}
    trace.weights = [{name: w.cpu() for name, w in step.items()} for step in trace.weights]
    return trace


def run_case_by(dispatcher: str, case: Case) -> Trace:
    """Trains ``case`` with that dispatcher for every layer."""
    used = []
    before, real = schedule.AUTO, schedule.ACROSS_RANKS[dispatcher]
    schedule.AUTO = dispatcher
    schedule.ACROSS_RANKS[dispatcher] = lambda *args: used.append(dispatcher) or real(*args)
    try:
        trace = run_case(case)
    finally:
        schedule.AUTO, schedule.ACROSS_RANKS[dispatcher] = before, real
    assert len(used) == len(case.num_experts)
    return trace


class EarlyOptimizer(Net):
    """Creates its optimizer before the experts are sharded."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.optimizer = make_optimizer(self.net, case.fused)

    def configure_optimizers(self) -> Any:
        schedule = {"scheduler": make_scheduler(self.optimizer), "interval": "step"}
        return {"optimizer": self.optimizer, "lr_scheduler": schedule}


def run_case_in_parts(case: Case) -> Trace:
    """Trains ``case`` with weights that are gathered 40 elements at a time."""
    with mock.patch.object(weight_gather, "PART", 40):
        return run_case(case)


def make_trainer(case: Case, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer for ``case``; batches are dealt out by the module itself."""
    defaults: dict[str, Any] = {
        "accelerator": case.accelerator,
        "devices": case.world // case.nodes,
        "num_nodes": case.nodes,
        "strategy": (SharedGPU if case.shared_gpu else FastMoEStrategy)(
            case.ep, stage=case.stage, **case.extra
        ),
        "precision": case.precision,
        "max_steps": -1 if case.batches_per_epoch else case.steps,
        "max_epochs": case.epochs,
        "accumulate_grad_batches": case.accumulate,
        "gradient_clip_val": case.clip,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **kwargs})


class SharedGPU(FastMoEStrategy):
    """Several ranks on one GPU over gloo, which is told not to split groups."""

    def _init_deepspeed_distributed(self) -> None:
        self._process_group_backend = "gloo"
        super()._init_deepspeed_distributed()
        dist.distributed_c10d._get_default_group().bound_device_id = None


class Tracer(pl.Callback):
    """Notes gradients of the first step, and norm and weights after each."""

    def __init__(self) -> None:
        self.trace = Trace()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.trace.gradients:
            scale = trainer.strategy.deepspeed_engine.optimizer.loss_scale
            gradients = whole_gradients(pl_module.net)
            self.trace.gradients = {name: g.float() / scale for name, g in gradients.items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == len(self.trace.weights):
            return
        self.trace.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))
        self.trace.weights.append(whole_weights(pl_module.net))


def global_losses(module: Net, case: Case, device: torch.device) -> list[float]:
    """The mean loss of each optimizer step over ranks and micro-batches."""
    own = torch.tensor(module.batch_losses, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(own)
    epochs = (own / case.world).view(case.epochs, -1)
    return [float(s.mean()) for epoch in epochs for s in epoch.split(case.accumulate)]


def whole_weights(net: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter whole: gathered from ZeRO 3 partitions and over expert ranks.

    In mixed precision the fp32 master weights: bf16 copies are too coarse to show a step.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    own = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            own[name] = safe_get_full_fp32_param(parameter).detach().clone()
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                own[name] = parameter.detach().clone()
        else:
            own[name] = parameter.detach().clone()
    return over_expert_ranks(net, own)


def whole_gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    """Every gradient whole, as the optimizer will see it before clipping."""
    from deepspeed.utils import safe_get_full_grad

    own = {name: safe_get_full_grad(p).detach().clone() for name, p in net.named_parameters()}
    return over_expert_ranks(net, own)


def over_expert_ranks(net: torch.nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates the experts of all ranks of the expert parallel group, by global id."""
    layers = [(name, layer) for name, layer in expert_layers(net) if layer.is_sharded]
    spread = {
        f"{layer_name}.experts.{name}": layer
        for layer_name, layer in layers
        for name, _ in layer.experts.named_parameters()
        if layer.experts.is_stacked and f"{layer_name}.experts.{name}" in own
    }
    whole = dict(own)
    for layer_name, layer in layers:
        if not layer.experts.is_stacked:  # modules, named after their global ids
            prefix = f"{layer_name}.experts."
            mine = {n: t for n, t in own.items() if n.startswith(prefix)}
            group = layer.schedule.dispatcher.group  # type: ignore[attr-defined]
            everyone: list[Any] = [None] * group.size
            dist.all_gather_object(everyone, mine, group=group.group)
            for theirs in everyone:
                whole.update(theirs)
    for name, layer in spread.items():
        group = layer.schedule.dispatcher.group  # type: ignore[attr-defined]
        parts = [torch.empty_like(own[name]) for _ in range(group.size)]
        dist.all_gather(parts, own[name].contiguous(), group=group.group)
        whole[name] = torch.cat(parts)
    return whole


def exchange_with_itself() -> dict[str, tuple[Tensor, Tensor]]:
    """A layer's outputs and gradients by NCCL in a group of one, and by the local dispatcher."""
    from lightning_fastmoe import MoE
    from lightning_fastmoe.distributed import AllToAllDispatcher, ExpertGroup
    from lightning_fastmoe.nn import LocalDispatcher, SequentialSchedule

    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    pl.seed_everything(1, verbose=False)
    layer = MoE(32, 48, 8, 2).to("cuda", torch.bfloat16)
    x = torch.randn(77, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    group = dist.group.WORLD
    assert group is not None
    results = []

    for dispatcher in (AllToAllDispatcher(ExpertGroup(group), 8), LocalDispatcher(8)):
        layer.schedule = SequentialSchedule(dispatcher)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)])
    names = ["output", "input", *(name for name, _ in layer.named_parameters())]
    exchanged, local = ([t.detach().cpu() for t in result] for result in results)
    return dict(zip(names, zip(exchanged, local, strict=True), strict=True))
