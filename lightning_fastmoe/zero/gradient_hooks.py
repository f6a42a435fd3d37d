"""Hands ZeRO 1 and 2's gradients to this package's averaging instead of DeepSpeed's buckets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from lightning_fastmoe.zero.gradient_reduction import GradientReduction, Reduced


class ZeroGradients(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer with another way from a gradient to a partition.

    A single rank leaves gradients where autograd put them. Several average them by
    :class:`~lightning_fastmoe.zero.gradient_reduction.GradientReduction`. Gradients that are
    offloaded or converted still take DeepSpeed's way.

    Attributes:
        model_order: id of a parameter -> its position in the model.
    """

    model_order: dict[int, int]
    overlap_comm: bool
    ready_for_gradients: bool

    @cached_property
    def _is_simple(self) -> bool:
        """Whether gradients stay on the device, in the parameters' dtype, and are averaged."""
        parameters = [p for group in self.bit16_groups for p in group]
        return (
            not (self.cpu_offload or self.use_grad_accum_attribute or self.zenflow)
            and self.sequence_parallel_size == 1
            and self.gradient_average
            and self.use_multi_rank_bucket_allreduce
            and all(self.get_param_comm_dtype(p) == p.dtype for p in parameters)
            and not any(map(self._use_compact_grad_partition_buffer, range(len(self.bit16_groups))))
        )

    @cached_property
    def _keeps_gradients(self) -> bool:
        """Whether there is nobody to reduce gradients with."""
        groups = (self.dp_process_group, *self.real_dp_process_group)
        return self._is_simple and all(dist.get_world_size(group) == 1 for group in groups)

    @cached_property
    def _reduction(self) -> GradientReduction:
        expected = sorted(
            self._reduced(), key=lambda one: -self.model_order.get(id(one.parameter), 0)
        )
        return GradientReduction(
            expected,
            dist.get_world_size(self.dp_process_group),
            int(self.reduce_bucket_size),
            self.overlap_comm,
        )

    def _reduced(self) -> Iterator[Reduced]:
        for group in self.bit16_groups:
            for parameter in group:
                if parameter.numel():
                    is_expert = is_moe_param(parameter)
                    yield Reduced(
                        parameter,
                        self.expert_dp_process_group[parameter.group_name]
                        if is_expert
                        else self.dp_process_group,
                        self.is_param_in_current_partition[self.get_param_id(parameter)],
                    )

    def drop_gradients(self, set_to_none: bool = True) -> None:
        """Drops the gradients of an unfinished accumulation, wherever they are.

        DeepSpeed's ``zero_grad`` leaves those that stage 2 has put aside, partitioned or offloaded.

        Args:
            set_to_none: what becomes of the parameters' own gradients.
        """
        self.zero_grad(set_to_none)
        self.micro_step_id = INITIAL_MICRO_STEP_ID  # the next backward pass adds to nothing
        for i in range(len(self.bit16_groups)):
            self.averaged_gradients[i] = self.all_grad_tensors[i] = None
        self._release_preflattened_grad_buffers()

    def setup_buckets(self) -> None:
        """Begins a backward pass; allocates DeepSpeed's buckets where they are used."""
        if self._keeps_gradients:
            return
        if self._is_simple:
            self.micro_step_id += not self.ready_for_gradients
            self.ready_for_gradients = True
            return
        super().setup_buckets()

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Called when autograd has a parameter's gradient."""
        if not self._keeps_gradients:
            super().process_gradients(param, i)

    def reduce_ready_partitions_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Has a gradient reduced, if this is the time for it."""
        if not self._keeps_gradients:
            super().reduce_ready_partitions_and_remove_grads(param, i)

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Has a gradient reduced."""
        if not self._is_simple:
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
        elif param.numel() and getattr(param, "ds_grad_is_ready", True):
            self._reduction.take(param)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduces what is left, at the end of a backward pass."""
        if self._keeps_gradients:
            return
        if not self._is_simple:
            super().reduce_ipg_grads(comm_dtype)
        elif self.partition_gradients or self.is_gradient_accumulation_boundary():
            self._reduction.finish()

    def independent_gradient_partition_epilogue(self) -> None:
        """Ends a backward pass, without making the host wait for the device."""
        overlap, self.overlap_comm = self.overlap_comm, self.overlap_comm and not self._is_simple
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = overlap
