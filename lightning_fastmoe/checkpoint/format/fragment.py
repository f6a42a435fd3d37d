"""The one idea behind sharded state: an interval of a tensor, called a fragment everywhere.

A tensor's elements are counted in row-major order, so that a fragment may begin and end anywhere in
a row. What a fragment is counted in differs, and each class says it:

* the whole model's tensor: ``OwnedFragment``, ``StoredFragment`` and ``ParameterFragment``;
* a parameter as this rank holds it, with its own experts alone: ``LocalFragment`` and
  ``FlatFragment`` of :mod:`~lightning_fastmoe.zero.state`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """An interval of a tensor's elements, in row-major order.

    Attributes:
        start: first element.
        length: number of elements.
    """

    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.length

    def within(self, whole: Tensor) -> Tensor:
        """The fragment's elements: a view of ``whole (numel,)``, the tensor that it counts in."""
        return whole[self.start : self.stop]


@dataclass(frozen=True, order=True)
class StoredFragment(Fragment):
    """A fragment of a tensor in a checkpoint, and the file that holds it.

    Attributes:
        file: name of a safetensors file.
        digest: first 8 hexadecimal digits of the SHA-256 of the file's bytes up to and including
            this fragment; they tell where a damaged file first differs.
    """

    file: str
    digest: str
