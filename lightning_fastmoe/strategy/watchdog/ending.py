"""Completes the exception that ends a run: a stalled kernel's report, an exit status."""

from __future__ import annotations

from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_fastmoe.ops.stall import stall_report
from lightning_fastmoe.strategy.watchdog.watch import TERMINATED_STATUS


def is_launched(strategy: ParallelStrategy) -> bool:
    """Whether Lightning launched this process, as one of rank 0's children."""
    environment = strategy.cluster_environment
    return isinstance(environment, LightningEnvironment) and strategy.local_rank > 0


def prepare_ending(exception: BaseException, launched: bool) -> None:
    """Completes the exception that ends a run; called on each rank.

    Args:
        exception: changed in place.
        launched: see :func:`is_launched`.
    """
    if report := stall_report():  # CUDA's own error names no kernel
        exception.add_note(f"lightning_fastmoe: {report}")
    if isinstance(exception, SIGTERMException) and exception.code is None:
        # Lightning raises it without a status, and Python would exit with 0. A launched rank does
        # so on purpose: Lightning kills rank 0 when one exits with any other status.
        exception.code = 0 if launched else TERMINATED_STATUS
