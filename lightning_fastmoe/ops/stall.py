"""What a kernel says that gave up waiting, so that an error can name the operator.

Each loop of our kernels in which threads wait for other threads has a deadline (csrc/deadline.h).
Past it the kernel traps, and whatever call of torch next looks at the device raises "unspecified
launch failure", which names nothing. The operators of this package raise the report instead;
:class:`~lightning_fastmoe.FastMoEStrategy` adds it to any exception that ends a run; and if neither
had a chance, it is printed when the process ends.

Environment:
    LIGHTNING_FASTMOE_DEVICE_TIMEOUT: seconds that a thread of a kernel waits (default 60; 0 is
        without a limit, for debuggers that stop kernels).
"""

from __future__ import annotations

import atexit
import sys
from typing import Any

_libraries: list[Any] = []


def watch(library: Any) -> None:
    """Has the report of ``library``, the operators' namespace, printed when the process ends."""
    _libraries.append(library)
    if len(_libraries) == 1:
        atexit.register(_print)


def stall_report() -> str:
    """Which kernel of this process gave up waiting, and for what; "" if none did.

    Works after the trap, when nothing on the device does: the report lies in the host's memory.
    """
    return next((text for library in _libraries if (text := library.stall_report())), "")


def _print() -> None:
    if text := stall_report():
        print(f"lightning_fastmoe: {text}", file=sys.stderr, flush=True)
