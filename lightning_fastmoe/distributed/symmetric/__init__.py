"""The exchange of tokens through memory that all ranks of a host map: no collective moves a row."""

from lightning_fastmoe.distributed.symmetric.exchange import SymmetricExchange

__all__ = ["SymmetricExchange"]
