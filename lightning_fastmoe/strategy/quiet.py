"""Silences messages of Lightning and DeepSpeed that users of this strategy can't act on.

Each message is matched by its text and by the module that prints it. Warnings about the user's own
code and data stay.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress

_LOGGED = {
    # Advertisements, at each start.
    "pytorch_lightning.utilities.rank_zero": (
        "\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud",
        "Enabling DeepSpeed ",  # the precision, which the user has set
    ),
    "pytorch_lightning.strategies.deepspeed": ("initializing deepspeed distributed",),
    # At every trainer.save_checkpoint(path), on every rank, though the default is meant.
    "pytorch_lightning.trainer.connectors.checkpoint_connector": ("`weights_only` was not set",),
    "DeepSpeed": (
        "**** You are using ZeRO with an untested optimizer",  # check_optimizer has tested it
        # None of its own choice is wanted; names that the user gives have another message.
        "ZeRO leaf module configuration did not match any modules",
    ),
}
_WARNED = (
    # Lightning's own use of torch, on every rank.
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"pytorch_lightning\.utilities\._pytree"),
    # Each sample is counted once here: see uneven.py.
    (
        r"Using `DistributedSampler` with the dataloaders",
        r"pytorch_lightning\.trainer\.connectors\.data_connector",
    ),
)


def quiet_logs() -> None:
    """Filters log messages, permanently; called before the Trainer logs its first line."""
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_is_wanted)  # the same function is added once


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if message.startswith("[rank: "):
        message = message.partition("] ")[2]
    return not message.startswith(_LOGGED[record.name])


def quiet_warnings() -> Callable[[], None]:
    """Filters warnings during a run.

    Returns:
        A function that removes the filters.
    """
    added = []
    for message, module in _WARNED:
        warnings.filterwarnings("ignore", message=message, module=module)
        added.append(warnings.filters[0])

    def undo() -> None:
        for entry in added:
            with suppress(ValueError):  # gone already if somebody has reset all filters
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return undo
