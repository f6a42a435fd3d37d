"""How ZeRO 1 and 2 reduce gradients: not at all on one rank, and without waits on several.

DeepSpeed copies each gradient into a bucket, divides it by the number of ranks, reduces it and
copies it out again, on a single rank too; and after each backward pass the host waits for the
device. Here:

* A single rank leaves gradients where autograd put them.
* Gradients larger than a bucket are reduced where autograd put them, and stay there.
* Streams wait for each other, the host doesn't.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


class ZeroGradients(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer with other ways from a gradient to a partition."""

    grads_in_partition: Tensor | None

    @cached_property
    def _keeps_gradients(self) -> bool:
        """Whether there is nobody to reduce gradients with."""
        groups = (self.dp_process_group, *self.real_dp_process_group)
        return self._is_simple and all(dist.get_world_size(group) == 1 for group in groups)

    @cached_property
    def _is_simple(self) -> bool:
        """Whether gradients are on the device, in the parameters' dtype."""
        return (
            not (self.cpu_offload or self.use_grad_accum_attribute or self.zenflow)
            and self.sequence_parallel_size == 1
            and not any(map(self._use_compact_grad_partition_buffer, range(len(self.bit16_groups))))
        )

    @property
    def _has_two_streams(self) -> bool:
        """Whether gradients are reduced on a stream of their own."""
        return self.overlap_comm and not get_accelerator().resolves_data_dependency()

    # ------------------------------------------------------------------------------------ one rank

    def setup_buckets(self) -> None:
        """Allocates what gradients are reduced in, if they are."""
        if not self._keeps_gradients:
            super().setup_buckets()

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Called when autograd has a parameter's gradient."""
        if not self._keeps_gradients:
            super().process_gradients(param, i)

    def reduce_ready_partitions_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Puts a gradient into a bucket, if it is to be reduced."""
        if not self._keeps_gradients:
            super().reduce_ready_partitions_and_remove_grads(param, i)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduces what is left in the buckets."""
        if not self._keeps_gradients:
            super().reduce_ipg_grads(comm_dtype)

    # -------------------------------------------------------------------------------- several ranks

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Reduces a bucket, or a gradient larger than one.

        A gradient that belongs to other ranks' partitions is released before it has been reduced;
        its memory must not be given to the stream that computes.
        """
        if self._has_two_streams:
            tensor.record_stream(self.reduction_stream)
        super().average_tensor(tensor, communication_data_type)

    def copy_grads_in_partition(self, param: Tensor, group_idx: int | None = None) -> None:
        """Moves a reduced gradient of this rank's partition out of its bucket, if it is in one."""
        if not (self._is_simple and self.contiguous_gradients):
            super().copy_grads_in_partition(param, group_idx)
            return
        if self._is_in_bucket(param):
            gradient = self.get_gradient_for_reduction(param)
            if self.grads_in_partition is None:
                own = [p for group in self.params_in_partition for p in group]
                size = sum(p.numel() for p in own if self._is_in_bucket(p))
                self.grads_in_partition = gradient.new_empty(size)
                self.grads_in_partition_offset = 0
            begin = self.grads_in_partition_offset
            self.grads_in_partition_offset = begin + param.numel()
            copy = self.grads_in_partition[begin : begin + param.numel()]
            copy.copy_(gradient.view(-1))
            gradient.data = copy.view_as(gradient)

    def _is_in_bucket(self, param: Tensor) -> bool:
        return param.numel() <= int(self.reduce_bucket_size)

    def independent_gradient_partition_epilogue(self) -> None:
        """Reduces what is left in the buckets, at the end of a backward pass."""
        if not (self._is_simple and self._has_two_streams):
            super().independent_gradient_partition_epilogue()
            return
        torch.cuda.current_stream().wait_stream(self.reduction_stream)
        self.overlap_comm = False  # the last bucket is reduced on this stream
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = True
