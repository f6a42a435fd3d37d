"""The optimizer's state by parameter: options, scalars and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.zero.state import FlatPartition


def elementwise(flat: FlatPartition) -> Iterator[tuple[str, Tensor]]:
    """The states with one value per element of the partition."""
    for name, value in flat.state.items():
        if isinstance(value, Tensor) and value.shape == flat.master.shape:
            yield name, value


def scalars(flat: FlatPartition) -> dict[str, Any]:
    """The states shared by the whole partition, such as ``step``.

    Raises:
        CheckpointError: for a state that is neither one value nor one per element: it depends on
            the whole partition and has no meaning on other ranks.
    """
    found = {}
    for name, value in flat.state.items():
        if isinstance(value, Tensor):
            if value.shape == flat.master.shape:
                if "/" in name:
                    raise CheckpointError(
                        f"The optimizer state {name!r} can't be saved: its name contains '/'."
                    )
                continue
            if value.dim():
                raise CheckpointError(
                    f"{type(flat.inner).__name__} keeps a state {name!r} of shape"
                    f" {tuple(value.shape)} for {flat.master.numel()} parameters. Such factored"
                    " states belong to one ZeRO partition and can't be resharded; use an"
                    " optimizer that keeps one value per parameter, such as AdamW."
                )
            value = value.detach().cpu().clone()
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise CheckpointError(
                f"{type(flat.inner).__name__} keeps a {type(value).__name__} as its state {name!r};"
                " checkpoints hold tensors and numbers. Use another optimizer."
            )
        found[name] = value
    return found


def shared_scalars(flats: Iterable[FlatPartition]) -> list[dict[str, Any]]:
    """The scalars of each partition and the names of its parameters, for JSON."""
    return [{"params": flat.names, "values": scalars(flat)} for flat in flats if flat.state]
