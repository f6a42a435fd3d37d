"""DeepSpeed's collectives, by the names that torch gives them now."""

from __future__ import annotations

import torch.distributed as dist

_SUCCESSORS = {
    "all_gather_function": "all_gather_single",
    "reduce_scatter_function": "reduce_scatter_single",
}


def modernise_collectives() -> None:
    """Lets DeepSpeed call what torch has put in the place of two deprecated collectives.

    They are the same functions under new names. Under the old ones, each call at stage 3 prints a
    warning, on every rank. Call it once DeepSpeed's back end is there.
    """
    from deepspeed.comm import comm

    for attribute, name in _SUCCESSORS.items():
        if hasattr(dist, name) and getattr(comm.cdb, attribute, None) is not None:
            setattr(comm.cdb, attribute, getattr(dist, name))
