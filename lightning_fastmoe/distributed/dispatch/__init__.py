"""Dispatchers: ways of exchanging tokens between ranks, one file each."""

from lightning_fastmoe.distributed.dispatch.all_to_all import AllToAllDispatcher
from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup
from lightning_fastmoe.distributed.dispatch.pending import EXCHANGE, PendingExchange
from lightning_fastmoe.distributed.dispatch.route import Route
from lightning_fastmoe.distributed.dispatch.waiting import ExchangeWait

__all__ = [
    "EXCHANGE",
    "AllToAllDispatcher",
    "ExchangeWait",
    "ExpertGroup",
    "PendingExchange",
    "Route",
]
