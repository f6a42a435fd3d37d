"""Dispatchers: ways of exchanging tokens between ranks, one file each."""

from lightning_fastmoe.distributed.dispatch.all_to_all import AllToAllDispatcher
from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup
from lightning_fastmoe.distributed.dispatch.pending import EXCHANGE, PendingExchange
from lightning_fastmoe.distributed.dispatch.waiting import ExchangeWait

ACROSS_RANKS = {"all_to_all": AllToAllDispatcher, "auto": AllToAllDispatcher}
"""The dispatcher of sharded experts, by the name that ``MoE(dispatcher=...)`` takes."""

__all__ = [
    "ACROSS_RANKS",
    "EXCHANGE",
    "AllToAllDispatcher",
    "ExchangeWait",
    "ExpertGroup",
    "PendingExchange",
]
