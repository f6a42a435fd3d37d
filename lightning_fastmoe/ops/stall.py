"""Reports of kernels that timed out waiting, so that errors can name the operator.

Every loop in this package's kernels in which threads wait for other threads has a deadline
(csrc/deadline.h). When it passes, the kernel traps, and the next torch call that touches the device
raises "unspecified launch failure", which doesn't name the kernel. This package's operators raise
the report instead; :class:`~lightning_fastmoe.FastMoEStrategy` adds it to any exception that ends a
run; otherwise it is printed when the process ends.

Environment:
    LIGHTNING_FASTMOE_DEVICE_TIMEOUT: seconds that a kernel's thread waits (default 60; 0 means no
        limit, for debuggers that stop kernels).
"""

from __future__ import annotations

import atexit
import sys
from typing import Any

_libraries: list[Any] = []


def watch(library: Any) -> None:
    """Registers ``library``, the operators' namespace, to print its report at process exit."""
    _libraries.append(library)
    if len(_libraries) == 1:
        atexit.register(_print)


def stall_report() -> str:
    """Which kernel of this process timed out, and what it waited for; "" if none did.

    The report is in host memory, so it can be read after the trap, when the device can't be used.
    """
    return next((text for library in _libraries if (text := library.stall_report())), "")


def _print() -> None:
    if text := stall_report():
        print(f"lightning_fastmoe: {text}", file=sys.stderr, flush=True)
