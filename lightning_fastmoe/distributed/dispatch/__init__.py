"""Ways of exchanging tokens between ranks, one file each."""

from lightning_fastmoe.distributed.dispatch.all_to_all import AllToAllDispatcher
from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup

__all__ = ["AllToAllDispatcher", "ExpertGroup"]
