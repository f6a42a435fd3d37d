"""ZeRO 1 and 2's optimizer step in fewer passes over the gradients.

DeepSpeed reads the gradients for NaN and Inf (three kernels for each tensor), as a copy in fp64 for
the norm, to join them, to convert them to fp32, and to multiply them by the clip factor. Here one
kernel reads them for the norm, which is summed in fp64 and finite exactly if every gradient is, and
one joins and converts them. The clip factor goes to the optimizer's own kernel, as
:class:`torch.amp.GradScaler` passes the loss scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def use_fewer_passes(optimizer: Any) -> None:
    """Replaces the step of a ZeRO 1 or 2 optimizer; leaves any other optimizer as it is.

    Args:
        optimizer: what DeepSpeed's engine calls its optimizer.
    """
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = ZeroOptimizer  # DeepSpeed's engine can't be told which to create


class ZeroOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer with another norm, overflow check and clipping; equal to rounding."""

    _clip_scale: Tensor | None = None

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
        mask_nan_or_inf_with_val_inplace(total, device=self.device)
        return total

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
        if not self._divides_gradients(grad_groups_flat):
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)
        elif self.clip_grad > 0.0:
            clip = ((total_norm / self.loss_scale) + 1e-6) / self.clip_grad
            self._clip_scale = torch.clamp(clip, min=1.0) * self.loss_scale
        elif self.loss_scale != 1.0:
            scale = float(self.loss_scale)
            self._clip_scale = torch.tensor(scale, dtype=torch.float32, device=self.device)

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
