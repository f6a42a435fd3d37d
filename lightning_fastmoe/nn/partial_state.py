"""Warns of state dicts of a model of which this rank has some experts only.

They have the names of a whole model, so that files made of them are found to lack most experts when
they are loaded, and the experts are gone by then.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.base import describe_ids

_WARNS = "_fastmoe_warns_of_partial_state"
_is_expected = contextvars.ContextVar("expected", default=False)


@contextmanager
def expected_partial_state() -> Iterator[None]:
    """Inside, the caller knows that state dicts have this rank's experts alone."""
    token = _is_expected.set(True)
    try:
        yield
    finally:
        _is_expected.reset(token)


def warn_of_partial_state(experts: Experts, layer: str) -> None:
    """Makes ``state_dict()`` warn.

    Args:
        experts: of which this rank holds some.
        layer: the layer's name.
    """
    held = f"{describe_ids(experts.local_ids)} of {experts.num_experts} of {layer}"
    if _WARNS not in vars(experts.holder):
        experts.holder.register_state_dict_pre_hook(_Warning(held))
        vars(experts.holder)[_WARNS] = True


class _Warning:
    """A hook; an object of a class, so that modules with it can be pickled."""

    def __init__(self, held: str) -> None:
        self._held = held

    def __call__(self, *_: Any) -> None:
        if not _is_expected.get():
            warnings.warn(
                f"state_dict() has experts {self._held}, those of this rank, under the names of a"
                " whole model. Save by Trainer.save_checkpoint(), or ExpertDataParallel's"
                " full_state_dict() in a plain loop, on all ranks.",
                stacklevel=5,
            )
