"""Keeps the frozen stacks up to date with single experts that are trained apart from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts.trained import merge, trained_of
from lightning_fastmoe.zero.state import partition_of


@torch.no_grad()
def merge_trained(layers: Iterable[ExpertLayer]) -> None:
    """Copies trained experts into their stacks, so that these hold the model; all ranks call it.

    Forward passes do so, too, but in what ZeRO 3 gathers for them.
    """
    for layer in layers:
        holder = layer.experts.holder
        trained = trained_of(holder)
        if trained is None:
            continue
        for name, own in trained.named_parameters():
            stack: Any = holder.get_parameter(name)
            if hasattr(own, "ds_tensor"):
                _merge_partitioned(stack, own, trained.rows)
        merge(holder)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Makes parameters whole that an earlier fit with ZeRO 3 left partitioned; collective.

    Writes to them are lost.
    """
    partitioned: list[Any] = [p for p in parameters if is_partitioned(p)]
    for parameter in partitioned:
        parameter.all_gather()
    try:
        yield
    finally:
        for parameter in partitioned:
            parameter.partition()


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO 3 has left this rank a part of the parameter alone."""
    return hasattr(parameter, "ds_tensor") and parameter.ds_status.name != "AVAILABLE"


def _merge_partitioned(stack: Any, own: Any, rows: tuple[int, ...]) -> None:
    """Writes the rows to this rank's partition of the stack."""
    if not rows:
        return  # nor have its replicas any
    with gathered([own]):
        values: Tensor = own.data.reshape(len(rows), -1).to(stack.ds_tensor)
        mine, row_size = partition_of(stack), values.shape[1]
        # Through .data: it is no edit of the user's.
        partition = stack.ds_tensor.data.view(-1)
        for place, row in enumerate(rows):
            first = max(mine.start, row * row_size)
            last = min(mine.stop, (row + 1) * row_size)
            if first < last:
                begin = first - row * row_size
                part = values[place, begin : begin + last - first]
                partition[first - mine.start : last - mine.start].copy_(part)
