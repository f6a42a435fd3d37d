"""Maps DeepSpeed's collectives to torch's current names."""

from __future__ import annotations

import torch.distributed as dist

_SUCCESSORS = {
    "all_gather_function": "all_gather_single",
    "reduce_scatter_function": "reduce_scatter_single",
}


def modernise_collectives() -> None:
    """Makes DeepSpeed call the successors of two collectives that torch deprecated.

    They are the same functions under new names. Under the old ones, each call at stage 3 prints a
    warning on every rank. Call this once DeepSpeed's back end exists.
    """
    from deepspeed.comm import comm

    for attribute, name in _SUCCESSORS.items():
        if hasattr(dist, name) and getattr(comm.cdb, attribute, None) is not None:
            setattr(comm.cdb, attribute, getattr(dist, name))
