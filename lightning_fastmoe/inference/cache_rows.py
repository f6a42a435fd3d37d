"""transformers' ``DynamicCache``, as a block sees it that computes some of the sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError

_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""The kinds of layers whose update returns what they hold, then the new positions."""


def rows_of_cache(value: Any) -> CacheRows | None:
    """Splits a cache of transformers; None for anything else.

    Raises:
        ConfigError: if it is a cache of another kind.
    """
    kinds = [one.__name__ for one in type(value).__mro__]
    if "Cache" not in kinds and "EncoderDecoderCache" not in kinds:
        return None
    if type(value).__name__ != "DynamicCache" or value.offloading:
        raise ConfigError(
            f"{type(value).__name__}{' with offloading' if 'DynamicCache' in kinds else ''} can't"
            " be split into chunks of sequences: use transformers' DynamicCache, or HostCache of"
            " lightning_fastmoe.huggingface, which keeps keys and values in host memory."
        )
    return CacheRows(value)


class CacheRows:
    """Gives each chunk its keys and values, and adds the new ones of all chunks at the end.

    Args:
        cache: transformers' DynamicCache.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._new: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._rows = (0, 0)

    def part(self, start: int, stop: int) -> CacheRows:
        """Itself, with the keys and values of sequences ``start`` to ``stop``."""
        self._rows = (start, stop)
        return self

    def join(self) -> None:
        """Adds the new keys and values of all chunks to the cache."""
        for layer, new in self._new.items():
            keys, values = (torch.cat(parts) for parts in zip(*new, strict=True))
            new.clear()
            self._cache.update(keys, values, layer)
        self._new.clear()

    def abandon(self) -> None:
        """Leaves the cache as it was."""
        self._new.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunk's sequences, also the new ones (n, H, positions, width)."""
        self._new.setdefault(layer_idx, []).append((key_states, value_states))
        layer = self._layer(layer_idx)
        if layer is None or not layer.is_initialized:
            return key_states.contiguous(), value_states.contiguous()
        start, stop = self._rows
        return (
            torch.cat([layer.keys[start:stop], key_states], dim=-2),
            torch.cat([layer.values[start:stop], value_states], dim=-2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the pass."""
        length: int = self._cache.get_seq_length(layer_idx)
        return length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(
            f"A layer uses {name} of its cache, which chunks of sequences don't have: run without"
            " chunk_sequences, or with use_cache=False."
        )

    def _layer(self, number: int) -> Any:
        layers = self._cache.layers
        layer = layers[number] if number < len(layers) else None
        kind = self._cache.layer_class_to_replicate if layer is None else type(layer)
        if getattr(kind, "__name__", None) not in _LAYERS:
            raise ConfigError(
                f"The cache's layer {number} is a {getattr(kind, '__name__', kind)}, which can't be"
                " split into chunks of sequences: run without chunk_sequences, or with"
                " use_cache=False."
            )
        return layer
