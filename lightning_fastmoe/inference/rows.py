"""Parts of a block's arguments that belong to some of the batch's sequences.

Which dimension of an argument is the batch can't be seen: a mask (S, S) of as many positions as
there are sequences looks like one with a row per sequence. So it is known by the argument's name,
from one of two places: a block declares it, as ``row_arguments``, or it is one of transformers',
whose decoder layers agree about their arguments. What is known from neither is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.cache_rows import rows_of_cache

RowRule = Callable[[Any, int, int], Any]
"""``rule(argument, start, stop)`` gives what belongs to these sequences."""

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class SplitArgument(Protocol):
    """An argument with a state of each sequence, such as a cache of keys and values."""

    def part(self, start: int, stop: int) -> Any:
        """What a block gets for sequences ``start`` to ``stop``; called in their order."""
        ...

    def join(self) -> None:
        """Called after the last part has been computed."""
        ...

    def abandon(self) -> None:
        """Called instead if a part has failed."""
        ...


class BlockArguments:
    """The arguments of one call of a block, for any of its sequences.

    Args:
        block: the module that is called.
        parameters: those of its forward method.
        args: the positional arguments, the first of them hidden states (B, ...).
        kwargs: the others.

    Attributes:
        hidden: the hidden states.

    Raises:
        ConfigError: if there are no hidden states.
    """

    def __init__(
        self,
        block: nn.Module,
        parameters: Mapping[str, inspect.Parameter],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        positional = [name for name, p in parameters.items() if p.kind in _POSITIONAL]
        named = dict(zip(positional, args, strict=False)) | dict(kwargs)
        self._args, self._kwargs = args, kwargs
        self._names = positional[: len(args)]
        self._where = type(block).__name__
        first = positional[0] if positional else None
        if first is None or len(args) > len(positional) or not _is_batch(named.get(first)):
            raise ConfigError(
                f"{self._where} can't be computed in chunks of sequences: its first argument isn't"
                " hidden states (batch, ...)."
            )
        self.hidden: Tensor = named[first]
        self._declared: Mapping[str, int | None | RowRule] | None = declared(block)
        self._splits: list[SplitArgument] = []
        self._parts: dict[str, Callable[[int, int], Any]] = {}
        self._first, self._named = first, named

    @property
    def chunk_rows(self) -> int | None:
        """Sequences of a chunk, if a cache is in chunks already."""
        sizes = (getattr(value, "chunk_rows", None) for value in self._named.values())
        return next((size for size in sizes if isinstance(size, int)), None)

    def split(self) -> int:
        """Finds out how each argument is split, and returns how many sequences there are.

        Raises:
            ConfigError: if that is unknown of one.
        """
        for name, value in self._named.items():
            self._parts[name] = self._splitter(name, value)
        return self.hidden.shape[0]

    def part(self, start: int, stop: int) -> tuple[list[Any], dict[str, Any]]:
        """Positional and other arguments of sequences ``start`` to ``stop``."""
        args = [self._parts[name](start, stop) for name in self._names]
        return args, {name: self._parts[name](start, stop) for name in self._kwargs}

    def join(self) -> None:
        """Called after the last part has been computed."""
        for split in self._splits:
            split.join()

    def abandon(self) -> None:
        """Called instead if a part has failed."""
        for split in self._splits:
            split.abandon()

    def _splitter(self, name: str, value: Any) -> Callable[[int, int], Any]:
        if name == self._first:
            hidden = (
                self.hidden
            )  # not by way of self: the pass's memory would wait for a collection
            return lambda start, stop: hidden[start:stop]
        if isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.dim() == 0):
            return lambda start, stop: value
        if (split := self._own(value)) is not None:
            self._splits.append(split)
            return split.part
        if self._declared is not None:
            if name not in self._declared:
                raise self._unknown(name, value, "row_arguments doesn't name it")
            rule = self._declared[name]
            if callable(rule):
                return lambda start, stop: rule(value, start, stop)
            if rule is None:
                return lambda start, stop: value
            size = value.shape[rule] if isinstance(value, Tensor) and value.dim() > rule else None
            if size != self.hidden.shape[0]:
                raise self._unknown(name, value, f"its dimension {rule} isn't the batch")
            return lambda start, stop: value.narrow(rule, start, stop - start)
        return self._of_transformers(name, value)

    def _own(self, value: Any) -> SplitArgument | None:
        """The argument's own way, if it is a cache."""
        split_rows = getattr(value, "split_rows", None)
        if split_rows is not None:
            split: SplitArgument = split_rows(self.hidden.shape[0])
            return split
        return rows_of_cache(value)

    def _of_transformers(self, name: str, value: Any) -> Callable[[int, int], Any]:
        dims = TRANSFORMERS.get(name)
        if name in WHOLE:
            return lambda start, stop: value
        if isinstance(value, tuple | list) and dims is not None:
            parts = [self._of_transformers(name, one) for one in value]
            kind = type(value)
            return lambda start, stop: kind(part(start, stop) for part in parts)
        if value is None:
            return lambda start, stop: None
        if dims is None:
            raise self._unknown(name, value, "its name isn't one of transformers' decoder layers")
        if not isinstance(value, Tensor) or value.dim() not in dims:
            raise self._unknown(name, value, f"it isn't a tensor of {_or(dims)} dimensions")
        if value.shape[0] == 1:
            return lambda start, stop: value
        if value.shape[0] != self.hidden.shape[0]:
            raise self._unknown(name, value, "its first dimension is neither the batch nor 1")
        return lambda start, stop: value[start:stop]

    def _unknown(self, name: str, value: Any, why: str) -> ConfigError:
        shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        return ConfigError(
            f"{self._where} can't be computed in chunks of sequences: which part of {name}"
            f" ({type(value).__name__}{shape}) belongs to a sequence is unknown, as {why}. Run"
            " without chunk_sequences, or declare the block's row_arguments."
        )


TRANSFORMERS: dict[str, tuple[int, ...]] = {
    "attention_mask": (2, 4),
    "causal_mask": (4,),
    "position_ids": (2,),
    "position_embeddings": (3,),
}
"""How many dimensions arguments of transformers' layers have, whose first is the batch or 1."""

WHOLE = frozenset({"cache_position"})
"""Arguments of transformers' layers that no sequence has a part of."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def declared(block: nn.Module) -> Mapping[str, int | None | RowRule] | None:
    """What a block says about its arguments; None if nothing."""
    inner = getattr(block, "_orig_mod", block)  # of torch.compile
    says: Mapping[str, int | None | RowRule] | None = getattr(inner, "row_arguments", None)
    return says


def is_known(block: nn.Module) -> bool:
    """Whether it is known that a block computes each sequence by itself."""
    inner = getattr(block, "_orig_mod", block)
    return declared(block) is not None or type(inner).__module__.startswith("transformers.models.")


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
