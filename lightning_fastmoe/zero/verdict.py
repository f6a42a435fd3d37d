"""Whether to take a step: what the device and the other ranks know about it.

The device knows before the host does. So the update is queued behind the verdict and does nothing
if anything speaks against it; while the device updates weights, the host reads the verdict and
queues the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """Whether to take a step.

    Identical on all ranks, except with nonfinite="ignore", where ranks don't communicate.

    Attributes:
        bad: layers that saw NaN or Inf since the last step.
        is_refused: whether a rank refuses the step.
        is_norm_finite: whether the norm of the gradients is finite.
        has_late_edits: whether, on any rank, weights were edited without a trace on the host, or
            the optimizer has got options that the queued update doesn't know.
        options_differ: whether some rank has other options of the optimizer, or clips by another
            norm.
    """

    bad: Sequence[str] = ()
    is_refused: bool = False
    is_norm_finite: bool = True
    has_late_edits: bool = False
    options_differ: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether nothing speaks against the step."""
        return self == Verdict()


class PendingVerdict:
    """A verdict that is on the device.

    Args:
        flags: int32: for each name, whether that layer saw NaN or Inf; with ``has_norm``, whether
            the gradients' norm is not finite and then any number of flags for late edits;
            whether a rank refuses; the largest digest of options and the largest negative digest.
        names: of the layers.
        has_norm: whether the flags say something about the norm.
    """

    def __init__(self, flags: Tensor, names: Sequence[str], has_norm: bool) -> None:
        self._names, self._has_norm = names, has_norm
        self.blocked = flags.sum(dtype=torch.int64)
        """Scalar in int64, on the device: zero exactly if the verdict is clear."""
        self._flags = torch.empty(
            flags.shape, dtype=flags.dtype, device="cpu", pin_memory=flags.is_cuda
        )
        self._flags.copy_(flags, non_blocking=True)
        self._copied = torch.cuda.Event() if flags.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Verdict:
        """The verdict, once the device has come to it; not what was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        *found, is_refused, largest, smallest = self._flags.tolist()
        count = len(self._names)
        return Verdict(
            bad=tuple(name for name, flag in zip(self._names, found, strict=False) if flag),
            is_refused=bool(is_refused),
            is_norm_finite=not (self._has_norm and found[count]),
            has_late_edits=any(found[count + self._has_norm :]),
            options_differ=largest != -smallest,
        )
