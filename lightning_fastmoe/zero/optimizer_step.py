"""ZeRO 1 and 2's optimizer step in fewer passes over gradients and weights.

DeepSpeed reads the gradients for NaN and Inf (three kernels for each tensor), as a copy in fp64 for
the norm, to join them, to convert them to fp32, and to multiply them by the clip factor; it steps,
converts the weights, and gathers them from all ranks. Here:

* One kernel reads them for the norm, which is summed in fp64 and finite exactly if every gradient
  is.
* With ``Adam(fused=True)`` and ``AdamW(fused=True)``, one kernel does the rest
  (:mod:`lightning_fastmoe.ops.adam_step`), and what it has updated is gathered while it updates the
  rest (:mod:`lightning_fastmoe.zero.weight_gather`). All of that is queued before the host knows
  whether the step is to be taken (:mod:`lightning_fastmoe.zero.verdict`).
* With other optimizers, one kernel joins and converts the gradients. A fused optimizer gets the
  clip factor for its own kernel, as :class:`torch.amp.GradScaler` passes the loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from lightning_fastmoe.ops.adam_step import AdamOptions, adam_step
from lightning_fastmoe.zero.gradient_hooks import ZeroGradients
from lightning_fastmoe.zero.weight_gather import WeightGather


def use_fewer_passes(optimizer: Any, model: nn.Module) -> None:
    """Replaces the step of a ZeRO 1 or 2 optimizer; leaves any other optimizer as it is.

    Args:
        optimizer: what DeepSpeed's engine calls its optimizer.
        model: whose parameters it optimizes.
    """
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = ZeroOptimizer  # DeepSpeed's engine can't be told which to create
        optimizer.model_order = {id(p): i for i, p in enumerate(model.parameters())}


class ZeroOptimizer(ZeroGradients):
    """DeepSpeed's optimizer in fewer passes; equal to rounding."""

    _clip_scale: Tensor | None = None
    _norm: Tensor | None = None
    _norm_is_finite: bool | None = None
    _is_updated = False

    # -------------------------------------------------------------------------- one update for all

    @property
    def updates_at_once(self) -> bool:
        """Whether the next step is :func:`~lightning_fastmoe.ops.adam_step.adam_step`'s."""
        optimizer = self.optimizer
        hooks = (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        )
        return (
            self._may_update_at_once
            and "step" not in vars(optimizer)
            and not any(hooks)
            and all(map(_is_plain, optimizer.param_groups))
        )

    @cached_property
    def _may_update_at_once(self) -> bool:
        return (
            type(self.optimizer) in (Adam, AdamW)
            and self.compute_grad_norm
            and not (self.cpu_offload or self.zenflow or self.torch_autocast_gradscaler)
            and all(p.dtype == torch.float32 for p in self.single_partition_of_fp32_groups)
        )

    def gradient_norm(self) -> Tensor:
        """The norm of the step's gradients over all ranks, times the loss scale.

        Returns:
            A scalar in fp32, identical on all ranks; Inf if any gradient is NaN or Inf.
        """
        if self._norm is None:
            self._norm = self.scaled_global_norm()
        return self._norm

    def tell_if_finite(self, is_finite: bool) -> None:
        """Takes over from the caller, who has it on the host, whether the norm is finite."""
        self._norm_is_finite = is_finite

    def forget_norm(self) -> None:
        """Drops the norm of gradients that are no longer those of the next step."""
        self._norm = self._norm_is_finite = None

    def update_unless(self, blocked: Tensor) -> None:
        """Queues the next step's update, before it is known whether there will be a step.

        If there is one, :meth:`step` takes this for its update.

        Args:
            blocked: scalar in int64, identical on all ranks: unless zero, nothing is updated.
        """
        self._is_updated = True
        self._begun = [
            p for p in self.single_partition_of_fp32_groups if not self.optimizer.state.get(p)
        ]
        self._update_all(self.loss_scale, blocked)

    def forget_update(self) -> None:
        """Called once the host knows that :meth:`update_unless` has updated nothing."""
        if self._is_updated:
            for master in self._begun:  # a checkpoint tells a state of zeros from none
                self.optimizer.state.pop(master, None)
        self._is_updated = False

    def step(self, closure: Any = None) -> None:
        """Takes a step, or skips it if a gradient is NaN or Inf."""
        try:
            if self._is_updated or self.updates_at_once:
                self._step_at_once()
            else:
                super().step(closure)
        finally:
            self._is_updated = False
            self.forget_norm()

    def _step_at_once(self) -> None:
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        self.overflow = False
        if self.check_grad_overflow:
            self.check_overflow()  # the engine may have decided to skip this step
        if not self.overflow and (self.dtype != torch.bfloat16 or self.check_grad_overflow):
            if self._norm_is_finite is None:
                self._norm_is_finite = bool(self.gradient_norm().isfinite())
            self.overflow = not self._norm_is_finite
        scale = self.loss_scale
        self._update_scale(self.overflow)
        if self.overflow:
            self._drop_step()
            return
        self._global_grad_norm = self.gradient_norm() / scale
        if not self._is_updated:
            self._update_all(scale)
        for i in range(len(self.bit16_groups)):
            self._free_gradients(i)
        self._lazy_init_hp_params_optimizer_state()

    def _drop_step(self) -> None:
        self._global_grad_norm = math.inf
        self.zero_grad(set_to_none=True)
        self._release_preflattened_grad_buffers()
        for group in self.averaged_gradients:
            self.averaged_gradients[group] = self.all_grad_tensors[group] = None

    def _divisor_of_gradients(self, norm: Tensor, scale: float) -> Tensor | None:
        """The loss scale times what clips the gradients."""
        if self.clip_grad > 0.0:
            clip = ((norm / scale) + 1e-6) / self.clip_grad
            return torch.clamp(clip, min=1.0) * scale
        if scale == 1.0:
            return None
        return torch.tensor(scale, dtype=torch.float32, device=norm.device)

    def _update_all(self, scale: float, blocked: Tensor | None = None) -> None:
        divisor = self._divisor_of_gradients(self.gradient_norm(), scale)
        for i in range(len(self.bit16_groups)):
            self._update(i, divisor, blocked)

    def _update(self, i: int, divisor: Tensor | None, blocked: Tensor | None) -> None:
        """Updates a group: this rank's partition, then the others' from their ranks."""
        group, master = self.optimizer.param_groups[i], self.single_partition_of_fp32_groups[i]
        state = self.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(master) for _ in range(2))
        state["step"] += 1 if blocked is None else blocked == 0
        ranks = self.real_dp_process_group[i]
        weights = self.parallel_partitioned_bit16_groups[i][dist.get_rank(ranks)].data
        options = AdamOptions(
            lr=_number(group["lr"]),
            betas=(_number(group["betas"][0]), _number(group["betas"][1])),
            eps=_number(group["eps"]),
            weight_decay=_number(group["weight_decay"]),
            decoupled=bool(group.get("decoupled_weight_decay")) or type(self.optimizer) is AdamW,
        )
        gather = WeightGather(self.bit16_groups_flat[i], ranks, self.reduction_stream)
        mean, mean_square = state["exp_avg"], state["exp_avg_sq"]
        for part in gather.parts():
            adam_step(
                list(_fragments(self.averaged_gradients[i], part)),
                master[part],
                mean[part],
                mean_square[part],
                weights[part],
                state["step"],
                options,
                divisor,
                blocked,
            )
            gather.start(part)
        gather.finish()

    def _free_gradients(self, i: int) -> None:
        """Drops a group's gradients, which have been applied."""
        self.free_grad_in_param_list(self.params_not_in_partition[i])
        self.free_grad_in_param_list(self.params_in_partition[i])
        self._release_preflattened_grad_buffers(i)
        self.averaged_gradients[i] = self.all_grad_tensors[i] = None

    # ---------------------------------------------------------------------------- other optimizers

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Leaves the check to the norm, which the base class looks at next."""
        if self.cpu_offload or not self.compute_grad_norm:
            super().check_overflow(partition_gradients)

    def get_grad_norm_direct(
        self, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2
    ) -> Tensor:
        """The 2-norm over all ranks, of one read of the gradients; -1 if any is NaN or Inf.

        Args:
            gradients: of this rank's partition.
            params: the parameters that they belong to.
            norm_type: 2.

        Returns:
            A scalar in fp32, identical on all ranks.
        """
        if norm_type != 2 or self.model_parallel_group is not None:
            norm: Tensor = super().get_grad_norm_direct(gradients, params, norm_type)
            return norm
        own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        own = [g.detach() for g, _ in zip(own, params, strict=False)]
        if own:
            norms = torch.stack(torch._foreach_norm(own, 2, dtype=torch.float64))
            total = norms.square().sum().float()
        else:
            total = torch.zeros((), dtype=torch.float32, device=self.device)
        dist.all_reduce(total, group=self.dp_process_group)
        total = total.sqrt()
        return torch.where(total.isfinite(), total, -1.0)

    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor | None:
        """This rank's gradients of a group, (partition size,), converted while they are joined."""
        found: Tensor | None = super()._get_preflattened_grad_partition(group_idx)
        gradients = self.averaged_gradients[group_idx]
        master = self.single_partition_of_fp32_groups[group_idx]
        if found is not None or all(g.dtype == master.dtype for g in gradients):
            return found  # the base class joins them by one copy too
        size = int(self.partition_size[group_idx])
        flat = torch.empty(size, dtype=master.dtype, device=gradients[0].device)
        lengths = [g.numel() for g in gradients]
        ranks = self.real_dp_process_group[group_idx]
        is_last = dist.get_rank(ranks) == dist.get_world_size(ranks) - 1
        if sum(lengths) != size and not is_last:
            return None  # the base class raises
        *parts, rest = flat.split([*lengths, size - sum(lengths)])
        torch._foreach_copy_(parts, [g.reshape(-1) for g in gradients])
        rest.zero_()  # what alignment adds to the last rank's
        return flat

    def unscale_and_clip_grads(self, grad_groups_flat: list[Any], total_norm: Tensor) -> None:
        """Divides gradients by the loss scale and clips them, or has the optimizer do so.

        Args:
            grad_groups_flat: the gradients of one group's partition, fp32.
            total_norm: their norm over all groups and ranks, times the loss scale.
        """
        if self._divides_gradients(grad_groups_flat):
            self._clip_scale = self._divisor_of_gradients(total_norm, self.loss_scale)
        else:
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)

    def _divides_gradients(self, gradients: list[Any]) -> bool:
        """Whether the optimizer's kernel can divide these gradients while it reads them."""
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return False
        partitions = self.single_partition_of_fp32_groups
        for group, partition in zip(self.optimizer.param_groups, partitions, strict=False):
            if any(partition.grad is g for g in gradients):
                return bool(group.get("fused"))
        return False

    def _optimizer_step(self, group_no: int) -> None:
        """Steps one group, with the scale of its gradients."""
        scale, self._clip_scale = self._clip_scale, None
        if scale is None:
            super()._optimizer_step(group_no)
            return
        self.optimizer.grad_scale = scale
        self.optimizer.found_inf = torch.zeros_like(scale)
        try:
            super()._optimizer_step(group_no)
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf


def _fragments(gradients: list[Tensor], part: slice) -> Iterator[Tensor]:
    """The fragments of a partition's gradients that are in a part of it."""
    begin = 0
    for gradient in gradients:
        end = begin + gradient.numel()
        first, last = max(part.start, begin), min(part.stop, end)
        if first < last:
            yield gradient.reshape(-1)[first - begin : last - begin]
        begin = end


def _number(option: Any) -> float:
    """An option; 0 for what is none, with which nothing is updated: see :func:`_is_plain`."""
    return float(option) if isinstance(option, float | int | Tensor) else 0.0


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group has the options that :func:`adam_step` knows.

    A learning rate that is a tensor on the CPU is a number: another rank may have it as one.
    """
    rate = group["lr"]
    if isinstance(rate, Tensor) and rate.device.type == "cpu" and rate.numel() == 1:
        rate = rate.item()
    return (
        bool(group["fused"])
        and not (group["amsgrad"] or group["maximize"] or group["differentiable"])
        and all(
            isinstance(x, float | int)
            for x in (rate, *group["betas"], group["eps"], group["weight_decay"])
        )
    )
