"""A cache of transformers whose keys and values are in host memory.

Imports transformers, and is imported on first use.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.host_rows import HostRows, HostRowsStatistics

_FULL, _SLIDING = "DynamicLayer", "DynamicSlidingWindowLayer"


class _HostLayer(CacheLayerMixin):
    """What masks ask about a layer.

    Args:
        window: positions that attention sees, with the current one; None for all.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.length = window, 0
        self.is_sliding = window is not None

    @property
    def first(self) -> int:
        """The first position that the next pass needs."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    @override
    def get_seq_length(self) -> int:
        return self.length

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length - self.first + query_length, self.first

    @override
    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    @override
    def reset(self) -> None:
        self.length = 0

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @override
    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError("HostCache is updated as a whole.")


class HostCache(Cache):
    """Keys and values in host memory, for ``generate`` with many sequences.

    With the same chunks it gives the numbers of transformers' own cache. Each call takes a new one,
    or one after :meth:`reset`, which saves registering its memory again::

        offload_experts(model, "cuda", chunk_sequences=64)
        cache = HostCache(model.config, max_length=512 + 64)
        model.generate(ids, max_new_tokens=64, past_key_values=cache)

    The GPU holds the keys and values of one layer and of two chunks: those that the chunk computes
    with, and those of the next. Each step copies all of them to the GPU. Host memory for
    ``max_length`` positions is taken, and registered with CUDA, in the first pass. Sliding windows
    take as much as full attention, but only what they see is copied.

    Args:
        config: of the model.
        max_length: positions of a sequence that there is room for: those of the prompt, with its
            padding, and the tokens to generate.

    Raises:
        ConfigError: if a layer has another state than keys and values.
    """

    def __init__(self, config: Any, max_length: int) -> None:
        if max_length < 1:
            raise ConfigError(f"max_length={max_length} must be positive.")
        layers = []
        for number, layer in enumerate(DynamicCache(config=config).layers):
            kind = type(layer).__name__
            window = getattr(layer, "sliding_window", None) if kind == _SLIDING else None
            if kind not in (_FULL, _SLIDING) or (kind == _SLIDING and (window or 0) < 2):
                raise ConfigError(
                    f"Layer {number} of {type(config).__name__} has a cache of kind {kind}, and"
                    " HostCache knows keys and values of full or sliding attention."
                )
            layers.append(_HostLayer(window))
        super().__init__(layers=list(layers))
        self._layers = layers
        self._is_broken = False
        self._rows = HostRows(max_length)
        self._chunks: list[tuple[int, int]] = []
        self._chunk: int | None = None  # None if a block computes the whole batch
        self._coming: dict[int, int] = {}  # lengths of layers once all chunks have been computed

    @property
    def statistics(self) -> HostRowsStatistics:
        """What has been copied so far."""
        return self._rows.statistics

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return self._rows.host_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes on the GPU of what has been copied ahead."""
        return self._rows.staging_bytes

    @property
    def chunk_rows(self) -> int | None:
        """Sequences of a chunk; None before the first pass."""
        return self._chunks[0][1] if self._chunks else None

    def split_rows(self, total: int) -> HostCache:
        """Itself, which has the methods of an argument in chunks."""
        return self

    def part(self, start: int, stop: int) -> HostCache:
        """Itself, of which :meth:`update` now means sequences ``start`` to ``stop``."""
        self._chunk = self._number(start, stop)
        return self

    def join(self) -> None:
        """All chunks of a block have been computed."""
        self._chunk = None
        for number, length in self._coming.items():
            self._layers[number].length = length
        self._coming.clear()

    def abandon(self) -> None:
        """A block has failed, so that some layers and chunks have positions that others lack."""
        self._is_broken = True

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds positions to the current chunk, and returns those that its layer sees.

        Args:
            key_states: (n, H, positions, width).
            value_states: the same; the width may be another.
            layer_idx: the layer.

        Raises:
            ConfigError: if there is no room, or the batch is another one.
        """
        if self._is_broken:
            raise ConfigError("A pass with this HostCache has failed: use a new one.")
        layer = self._layers[layer_idx]
        is_whole = self._chunk is None
        chunk = self._number(0, len(key_states)) if self._chunk is None else self._chunk
        keys, values = key_states.contiguous(), value_states.contiguous()
        if layer.length:
            past = self._rows.past((layer_idx, chunk), layer.first, layer.length)
            keys = torch.cat([past[0], key_states], dim=-2)
            values = torch.cat([past[1], value_states], dim=-2)
        self._rows.write((layer_idx, chunk), layer.length, key_states, value_states)
        self._coming[layer_idx] = layer.length + key_states.shape[-2]
        if is_whole:
            self.join()
        self._stage_after(layer_idx, chunk)
        return keys, values

    def _number(self, start: int, stop: int) -> int:
        """The number of a chunk, which is a new one in the first pass alone."""
        chunk = (start, stop)
        if chunk not in self._chunks:
            end = self._chunks[-1][1] if self._chunks else 0
            if self.get_seq_length() or start != end:
                raise ConfigError(
                    f"HostCache holds sequences in chunks {self._chunks}, and a block computes"
                    f" {start} to {stop}: use a new cache for other batches and chunks."
                )
            self._chunks.append(chunk)
        return self._chunks.index(chunk)

    def _stage_after(self, layer: int, chunk: int) -> None:
        """Starts to copy what is needed next; after the last layer comes the first."""
        if chunk + 1 < len(self._chunks):
            chunk += 1
        else:
            layer, chunk = (layer + 1) % len(self._layers), 0
        length = self._layers[layer].length
        if length:
            self._rows.stage((layer, chunk), self._layers[layer].first, length)

    @override
    def reset(self) -> None:
        """Forgets all positions; the next batch uses the same memory, as far as it is as large."""
        super().reset()
        self._rows.forget()
        self._chunks.clear()
        self._coming.clear()
        self._chunk, self._is_broken = None, False

    @override
    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        raise self._can_not("be reordered, which beam search needs")

    @override
    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise self._can_not("repeat sequences")

    @override
    def batch_select_indices(self, indices: Any) -> NoReturn:
        raise self._can_not("drop sequences")

    @override
    def crop(self, *_: Any, **__: Any) -> NoReturn:
        raise self._can_not("drop positions, which assisted decoding needs")

    @property
    @override
    def is_croppable(self) -> bool:
        return False

    @staticmethod
    def _can_not(do: str) -> ConfigError:
        return ConfigError(
            f"HostCache can't {do}: generate greedily or by sampling, or with transformers' own"
            " cache."
        )
