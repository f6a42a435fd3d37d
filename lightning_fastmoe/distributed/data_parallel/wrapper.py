"""Trains a model with sharded experts in a loop of the user's own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from lightning_fastmoe.distributed.data_parallel import full_state
from lightning_fastmoe.distributed.data_parallel.agreement import Report, agree
from lightning_fastmoe.distributed.data_parallel.clipping import global_norm
from lightning_fastmoe.distributed.data_parallel.contents import Contents, Item
from lightning_fastmoe.distributed.data_parallel.loss_scale import UNKNOWN, KnownLossScale
from lightning_fastmoe.distributed.data_parallel.reduction import average_gradients
from lightning_fastmoe.distributed.data_parallel.start import (
    agree_to_start,
    broadcast_start,
    check_device,
    check_same_model,
    choose_options,
)
from lightning_fastmoe.distributed.data_parallel.unreduced import UnreducedGradients
from lightning_fastmoe.distributed.dispatch import ExchangeWait, PendingExchange
from lightning_fastmoe.distributed.each_rank import run_on_each_rank
from lightning_fastmoe.distributed.mesh import make_expert_mesh
from lightning_fastmoe.distributed.shard import ExpertSharder
from lightning_fastmoe.errors import ConfigError, FastMoEError, TopologyError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.nonfinite import take_largest

_Result = TypeVar("_Result")


class ExpertDataParallel:
    """Expert parallelism for a plain PyTorch loop: what DDP is for dense models, by hand.

    Every rank builds the same model, calls this after ``init_process_group`` and before it makes
    the optimizer, and then trains on its own batches::

        parallel = ExpertDataParallel(model, expert_parallel_size=2)
        optimizer = torch.optim.AdamW(model.parameters())
        ...
        parallel.backward(loss)
        parallel.reduce_gradients()
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    The model is changed in place: of sharded layers, ours or transformers', each rank keeps its
    experts only. Dense weights are copied from rank 0, experts' from the first rank that has them.
    Then each step equals that of one process with all ranks' batches, whose loss is the mean of the
    ranks' losses. Without a process group it is a single rank.

    FastMoE's ``DistributedGroupedDataParallel`` and Megatron-Core's ``DistributedDataParallel``
    have the same place in a loop.

    Args:
        model: on this rank's device. Call its parts, or the model itself, as before.
        expert_parallel_size: number of ranks over which experts are sharded. It divides the number
            of ranks and the ``num_experts`` of each layer. "auto" is the size for which the model
            is sharded already, or else the largest that keeps each group inside a node.
        bucket_bytes: up to this size gradients are reduced together.
        reduce_dtype: the dtype in which gradients are summed over ranks, such as fp32 for gradients
            in bf16; None is their own.
        ranks_per_node: consecutive ranks that share a node; None is torchrun's
            ``LOCAL_WORLD_SIZE``, or else all ranks.
        timeout: the time limit of a collective in groups made here, and of an exchange of tokens;
            None is torch's defaults, and 30 minutes.

    Attributes:
        model: the model.
        mesh: the expert parallel and expert data parallel groups; None without a process group.

    Raises:
        TopologyError: on all ranks, if the size does not fit the ranks or the layers, or the ranks
            have built different models or got different options; or if the model is already
            sharded for another size.
        ConfigError: on all ranks, if the model has experts that can't be sharded or trained like
            this; on this rank, if an argument is invalid or the model is on the wrong device.
    """

    def __init__(
        self,
        model: nn.Module,
        expert_parallel_size: int | Literal["auto"] = "auto",
        *,
        bucket_bytes: int = 2**25,
        reduce_dtype: torch.dtype | None = None,
        ranks_per_node: int | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        if isinstance(model, DistributedDataParallel | DataParallel):
            raise ConfigError(
                f"The model is wrapped in {type(model).__name__}, which would average experts over"
                " ranks that hold different ones. Pass the model inside: model.module."
            )
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes={bucket_bytes} must be positive.")
        if reduce_dtype is not None and not reduce_dtype.is_floating_point:
            raise ConfigError(f"reduce_dtype={reduce_dtype} must be a floating-point dtype.")
        self.model = model
        self._layers = dict(expert_layers(model))
        self._device = check_device([*model.named_parameters(), *model.named_buffers()])
        self._bucket_bytes, self._reduce_dtype = bucket_bytes, reduce_dtype
        ours = [layer for layer in self._layers.values() if isinstance(layer, MoE)]
        ignoring = {id(layer) for layer in ours if layer.nonfinite_policy == "ignore"}
        self._sharder = self._shard(expert_parallel_size, ranks_per_node, timeout)
        self.mesh = self._sharder.mesh if self._sharder is not None else None
        self._scale = KnownLossScale()
        for name, layer in self._layers.items():
            layer.layer_name = name or type(layer).__name__
            layer.nonfinite.begin(self._device, collects=id(layer) not in ignoring)
        for moe in ours:
            moe.balancing.scale = self._scale
        self._scale.follow(model)
        self._contents = Contents(model, self._layers)
        # Numbers of the experts' parameters on each rank of the expert parallel group.
        self._counts = [sum(item.is_expert for item in self._contents.parameters)]
        if self.mesh is not None:
            self._counts = check_same_model(self._contents, self._layers, self.mesh)
            broadcast_start(self._contents, self.mesh)
        self._reduced: list[weakref.ref[Tensor]] = []
        alone = self.mesh is None or self.mesh.ep_size * self.mesh.edp_size == 1
        self._unreduced = UnreducedGradients(model, [] if alone else self._contents.parameters)

    def backward(self, loss: Tensor, divisor: float = 1.0) -> None:
        """Differentiates ``loss / divisor``, and the balancing losses with the same divisor.

        Nothing is exchanged but tokens: gradients add up in ``.grad`` until
        :meth:`reduce_gradients`.

        Args:
            loss: the scalar loss of this rank's batch.
            divisor: the number of batches whose gradients are accumulated.

        Raises:
            ConfigError: if the divisor is not positive, or gradients have been reduced already.
            ExchangeError: on all ranks, if a rank has skipped a MoE layer in the forward pass.
        """
        if not divisor > 0:
            raise ConfigError(f"divisor={divisor} must be positive: it divides the loss.")
        if (problem := self._reduced_before()) is not None:
            raise ConfigError(problem)
        self._end_pass()
        with self._scale.of(loss):
            (loss if divisor == 1.0 else loss / divisor).backward()

    def reduce_gradients(self) -> None:
        """Averages gradients over the global batch; every rank calls this once before each step.

        A dense gradient is averaged over all ranks. The gradient of an expert holds the tokens of
        all ranks of its expert parallel group already, so it is summed over the replicas of the
        expert and divided by the number of all ranks.

        A parameter whose gradient is None on some ranks gets zeros there; one that has a gradient
        on no rank keeps None. Frozen parameters are left out.

        Raises:
            ConfigError: on all ranks, if gradients have been reduced already, are sparse, belong to
                parameters that are new or frozen on some ranks only, or were changed differently
                before the latest step, or if a rank has skipped it.
            NonFiniteError: on all ranks, if NaN or Inf reached a router since the last call.
        """
        self._end_pass()
        used = agree(self._report(), self._contents, self._counts, self.mesh, self._device)
        self._scale.watched = 0
        for item in used:
            if item.tensor.grad is None:
                item.tensor.grad = torch.zeros_like(item.tensor)
        if self.mesh is not None:
            world = self.mesh.ep_size * self.mesh.edp_size
            for is_expert, group in ((False, None), (True, self.mesh.edp_group)):
                average_gradients(
                    [_grad(item) for item in used if item.is_expert is is_expert],
                    group,
                    world,
                    self._bucket_bytes,
                    self._reduce_dtype,
                )
        self._reduced = [weakref.ref(_grad(item)) for item in used]
        self._unreduced.reduced()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """:func:`torch.nn.utils.clip_grad_norm_` of the whole model, where each expert counts once.

        Every rank calls this, after :meth:`reduce_gradients`.

        Args:
            max_norm: the largest norm that is left as it is.
            norm_type: p of the norm, positive; may be ``inf``.
            error_if_nonfinite: whether a norm of NaN or Inf is an error; it makes the host wait.

        Returns:
            The norm before clipping: a scalar, identical on every rank.

        Raises:
            ConfigError: if gradients have not been reduced, or ``norm_type`` is not positive.
            RuntimeError: on all ranks, if the norm is not finite and that is an error.
        """
        if not norm_type > 0:
            raise ConfigError(f"norm_type={norm_type} must be positive; inf is allowed.")
        trained = [item for item in self._contents.parameters if item.tensor.grad is not None]
        reduced = {id(g) for ref in self._reduced if (g := ref()) is not None}
        if late := [
            i.name for i in trained if i.tensor.requires_grad and id(_grad(i)) not in reduced
        ]:
            raise ConfigError(
                f"clip_grad_norm_: the gradient of {late[0]} is this rank's own, and ranks would"
                " clip by different norms. Call reduce_gradients() first, once for each step."
            )
        trained = [item for item in trained if id(_grad(item)) in reduced]
        norm = global_norm(
            (_grad(item) for item in trained if not item.is_expert),
            (_grad(item) for item in trained if item.is_expert),
            self.mesh.ep_group if self.mesh is not None and self.mesh.ep_size > 1 else None,
            float(norm_type),
            self._device,
        )
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The norm of order {norm_type} of all gradients is {norm.item()}, so they can't be"
                " clipped. Skip the step, or pass error_if_nonfinite=False."
            )
        nn.utils.clip_grads_with_norm_([item.tensor for item in trained], max_norm, norm)
        self._unreduced.remember_versions()
        return norm

    def on_each_rank(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Runs ``function`` on every rank, for example to generate from prompts of its own.

        See :func:`~lightning_fastmoe.distributed.each_rank.run_on_each_rank`.
        """
        call = partial(function, *args, **kwargs)
        return run_on_each_rank(self.model, self._layers, lambda: None, self._device, call)

    def full_state_dict(self) -> dict[str, Any]:
        """The state dict of the whole model, on the CPU of rank 0; every rank calls this.

        Its names and shapes are those of a model with all experts, so it loads into one, and, by
        :meth:`load_full_state_dict`, into models sharded over any number of ranks.

        Returns:
            The state dict on rank 0; an empty dictionary on the others.

        Raises:
            CheckpointError: if a tensor of experts has no row for each of them.
            ExchangeError: on all ranks, if a rank is still in a MoE layer.
        """
        self._end_pass()
        return full_state.gather_model(self._contents, self.mesh)

    def load_full_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Loads a state dict of the whole model; each rank takes its own experts from it.

        Args:
            state: the same on every rank, from :meth:`full_state_dict` or a model with all experts.
                ``torch.load(path, mmap=True)`` reads only what is taken.
            strict: names must match exactly.

        Raises:
            CheckpointError: if a layer has another number of experts there.
            RuntimeError: from PyTorch, if names or shapes don't match.
        """
        full_state.load_model(self._contents, state, strict)

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the whole model's optimizer, on the CPU of rank 0; every rank calls this.

        Args:
            optimizer: over parameters of the model.

        Returns:
            On rank 0 ``{"state": {name: ...}, "param_groups": [...]}``, as in an optimizer's state
            dict, but with names of parameters, and where SparseUpdate trains single experts their
            ids as ``"trained_experts"``; an empty dictionary on the others.

        Raises:
            CheckpointError: if a state of experts has no row for each of them.
            ExchangeError: on all ranks, if a rank is still in a MoE layer.
        """
        self._end_pass()
        return full_state.gather_optimizer(self._contents, optimizer, self.mesh)

    def load_full_optimizer_state_dict(
        self, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Loads what :meth:`full_optimizer_state_dict` returned; each rank takes its own part.

        Args:
            optimizer: with the same groups as the one that was saved.
            state: the same on every rank.

        Raises:
            CheckpointError: if the groups don't match, a layer has another number of experts, or
                SparseUpdate trained other single experts.
        """
        full_state.load_optimizer(self._contents, optimizer, state)

    # -------------------------------------------------------------------------------------- set-up

    def _shard(
        self,
        size: int | Literal["auto"],
        ranks_per_node: int | None,
        timeout: timedelta | None,
    ) -> ExpertSharder | None:
        """Shards the experts over the ranks; None without a process group."""
        joined = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if joined else 1
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if not joined and (size not in (1, "auto") or started > 1):
            raise TopologyError(
                f"expert_parallel_size={size!r} with WORLD_SIZE={started}, but this process has no"
                " process group. Call torch.distributed.init_process_group() first, in processes"
                " started by torchrun; a single process has expert_parallel_size=1."
            )
        problem: FastMoEError | None = None
        options: dict[str, int] = {}
        try:
            options = choose_options(self.model, self._layers, size, ranks_per_node, world)
        except FastMoEError as error:
            problem = error
        if joined:
            agree_to_start(problem, options, self._layers)
        elif problem is not None:
            raise problem
        sharder: ExpertSharder | None = None
        if joined:
            mesh = make_expert_mesh(options["expert_parallel_size"], self._device.type, timeout)
            nodes = [rank // options["ranks_per_node"] for rank in range(world)]
            sharder = ExpertSharder(mesh, nodes, timeout)
            # Of the host, too: a wait for symmetric memory is in no collective.
            limit = default_pg_timeout if timeout is None else timeout
            wait = ExchangeWait(limit.total_seconds(), rank=dist.get_rank(), option="timeout")
            sharder.record_exchanges(PendingExchange(), wait)
            sharder.shard(self.model)
        elif any(layer.is_sharded for layer in self._layers.values()):
            raise TopologyError(
                "The model holds only some of its experts, but this process is in no process group."
                " Build it with all experts, or call torch.distributed.init_process_group() first."
            )
        return sharder

    # -------------------------------------------------------------------------------------- a step

    def _end_pass(self) -> None:
        """Notices a rank that skipped MoE layers, before the ranks wait for each other."""
        if self._sharder is not None:
            self._sharder.end_pass(self._layers.values(), self._device)

    def _report(self) -> Report:
        """What this rank has to say."""
        found = take_largest((layer.nonfinite for layer in self._layers.values()), self._device)
        return Report(self._problem(), found.isfinite().all(), *self._unreduced.take_found())

    def _problem(self) -> str | None:
        if (name := next(self._contents.new_parameters(), None)) is not None:
            return (
                f"{name} was not in the model when ExpertDataParallel wrapped it, so its gradient"
                " would not be averaged over ranks. Create all parameters first, then wrap."
            )
        if self._scale.in_graphs and not self._scale.watched:
            return UNKNOWN
        for item in self._contents.parameters:
            gradient = item.tensor.grad
            if gradient is None or not item.tensor.requires_grad:
                continue
            if gradient.layout is not torch.strided:
                return f"The gradient of {item.name} is sparse: use nn.Embedding(sparse=False)."
        return self._reduced_before()

    def _reduced_before(self) -> str | None:
        """Why nothing may be added to a gradient: it is that of all ranks already."""
        before = {id(g) for ref in self._reduced if (g := ref()) is not None}
        for item in self._contents.parameters:
            if item.tensor.requires_grad and id(item.tensor.grad) in before:
                return (
                    f"The gradient of {item.name} has already been averaged over ranks. Call"
                    " reduce_gradients() once for each step, after all of its backward passes, and"
                    " optimizer.zero_grad(set_to_none=True), the default, after the step."
                )
        return None


def _grad(item: Item) -> Tensor:
    assert item.tensor.grad is not None
    return item.tensor.grad
