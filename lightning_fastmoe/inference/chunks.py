"""Blocks of a model that compute a batch in chunks of sequences, one block after the other.

A batch large enough to hide the copies of experts has activations too large for the GPU. So only
hidden states of the whole batch are kept, between blocks; what a block needs inside exists for a
chunk at a time. All chunks of a block run while its experts are in their slot. MoE-Gen (Xu et al.
2025, arXiv 2503.09716) batches attention and experts separately for the same reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.rows import BlockArguments, is_known
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.moe import MoE

AUTO_TOKENS = 16_384
"""Tokens of a chunk of ``chunk_sequences="auto"``: a GPU is busy, and activations are small."""

_RECORDS = ("output_router_logits", "output_attentions")
_NORMS = ("LayerNorm", "RMSNorm")

ChunkSize = int | str
Hold = Callable[[], AbstractContextManager[None]]


class ChunkedBlocks:
    """Makes the blocks of a model compute in chunks; closing it undoes that.

    Blocks are the modules of a ``ModuleList`` of which one has experts. Final norms next to such a
    list are computed in chunks, too.

    Args:
        model: has the blocks.
        chunk_sequences: sequences of a chunk; ``"auto"`` for :data:`AUTO_TOKENS` tokens.
        hold: makes a context in which experts stay where they are between the chunks of a block.

    Raises:
        ConfigError: if ``chunk_sequences`` is out of range, or a block can't be computed in chunks.
    """

    def __init__(self, model: nn.Module, chunk_sequences: ChunkSize, hold: Hold) -> None:
        check_chunk(chunk_sequences)
        self._forwards: list[_ChunkedForward] = []
        found = list(_lists(model))
        if not found:
            raise ConfigError(
                f"{type(model).__name__} can't be computed in chunks of sequences: its experts are"
                " not in blocks of an nn.ModuleList."
            )
        for _, blocks in found:
            _check(blocks)
        for owner, blocks in found:
            for block in blocks:
                self._forwards.append(_ChunkedForward(block, owner, chunk_sequences, hold))
            for norm in _final_norms(owner):
                self._forwards.append(_ChunkedForward(norm, owner, chunk_sequences, None))
        for forward in self._forwards:
            forward.install()

    def close(self) -> None:
        """The blocks compute whole batches again."""
        for forward in self._forwards:
            forward.remove()
        self._forwards.clear()


def check_chunk(chunk_sequences: ChunkSize) -> None:
    """Checks a number of sequences.

    Raises:
        ConfigError: if it is neither ``"auto"`` nor positive.
    """
    is_number = isinstance(chunk_sequences, int) and not isinstance(chunk_sequences, bool)
    if chunk_sequences != "auto" and not (is_number and int(chunk_sequences) >= 1):
        raise ConfigError(
            f'chunk_sequences={chunk_sequences!r} must be a positive number, "auto" or None.'
        )


class _ChunkedForward:
    """The forward method of a block.

    Args:
        block: the module.
        owner: the module of its list, which may have a config of transformers.
        size: sequences of a chunk.
        hold: see :class:`ChunkedBlocks`; None if the module has no experts.
    """

    def __init__(
        self, block: nn.Module, owner: nn.Module, size: ChunkSize, hold: Hold | None
    ) -> None:
        self._block, self._owner, self._size, self._hold = block, owner, size, hold
        self._forward = block.forward
        self._replaced = vars(block).get("forward")
        inner = getattr(block, "_orig_mod", block)  # of torch.compile
        self._parameters = inspect.signature(inner.forward).parameters

    def install(self) -> None:
        vars(self._block)["forward"] = self

    def remove(self) -> None:
        if self._replaced is None:
            vars(self._block).pop("forward", None)
        else:
            vars(self._block)["forward"] = self._replaced

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """That of a copy of the block, which is an ordinary one."""
        copied = memo.get(id(self._block), self._block)
        return MethodType(type(copied).forward, copied)

    # Not recursive: a block that is compiled stays so.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hold is None and not (args and isinstance(args[0], Tensor) and args[0].dim() > 1):
            return self._forward(*args, **kwargs)  # a norm of something else
        arguments = BlockArguments(self._block, self._parameters, args, kwargs)
        size = arguments.chunk_rows or self._rows(arguments.hidden)
        if size >= arguments.hidden.shape[0]:
            return self._forward(*args, **kwargs)
        self._check(kwargs)
        with nullcontext() if self._hold is None else self._hold():
            try:
                return self._chunks(arguments, size)
            except BaseException:
                arguments.abandon()
                raise

    def _rows(self, hidden: Tensor) -> int:
        if isinstance(self._size, int):
            return self._size
        return max(1, AUTO_TOKENS // max(1, hidden.shape[1]))

    def _check(self, kwargs: dict[str, Any]) -> None:
        name = type(self._block).__name__
        if self._block.training:
            raise ConfigError(
                f"{name} is training, which chunks of sequences may change: call eval() first."
            )
        config = getattr(self._owner, "config", None)
        for record in _RECORDS:
            asked = kwargs.get(record)
            if getattr(config, record, False) if asked is None else asked:
                raise ConfigError(
                    f"{record}=True: {name} would record a value for each chunk, and not for the"
                    f" batch. Run without {record}, or without chunk_sequences."
                )

    def _chunks(self, arguments: BlockArguments, size: int) -> Tensor:
        total = arguments.split()
        out: Tensor | None = None
        for start in range(0, total, size):
            stop = min(start + size, total)
            args, kwargs = arguments.part(start, stop)
            part = self._one(self._forward(*args, **kwargs), arguments.hidden, stop - start)
            if out is None:
                out = part.new_empty((total, *part.shape[1:]))
            out[start:stop] = part
        arguments.join()
        assert out is not None
        return out

    def _one(self, output: Any, hidden: Tensor, rows: int) -> Tensor:
        """The hidden states that a block returns."""
        name = type(self._block).__name__
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"{name} returns a {type(output).__name__}, and chunks of sequences are joined of"
                " hidden states alone: run without chunk_sequences."
            )
        if output.shape != (rows, *hidden.shape[1:]):
            raise ConfigError(
                f"{name} returns {tuple(output.shape)} for hidden states"
                f" {(rows, *hidden.shape[1:])}, which can't be joined: run without"
                " chunk_sequences."
            )
        return output


def _lists(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules with a list of blocks that have experts, and the blocks; innermost lists alone."""
    with_experts = {id(layer.experts.holder) for _, layer in expert_layers(model)}
    found: list[tuple[nn.Module, list[nn.Module], set[int]]] = []
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList):
                blocks = list(child)
                inside = {id(m) for block in blocks for m in block.modules() if m is not block}
                if inside & with_experts:
                    found.append((owner, blocks, inside))
    for owner, blocks, inside in found:
        if not any({id(one) for one in others} & inside for _, others, _ in found):
            yield owner, blocks


def _check(blocks: Sequence[nn.Module]) -> None:
    """Refuses blocks of which a chunk isn't computed as in the whole batch."""
    for block in blocks:
        name = type(getattr(block, "_orig_mod", block)).__name__
        if not is_known(block):
            raise ConfigError(
                f"Whether {name} computes each sequence of a batch by itself is unknown. If it"
                " does, and the first dimension is the batch, say so in the class:"
                " row_arguments = {}, with the name of each further tensor argument and its"
                " dimension that is the batch, or None."
            )
        layers = list(expert_layers(block))
        if len(layers) > 1:
            raise ConfigError(
                f"{name} has {len(layers)} layers with experts ({', '.join(n for n, _ in layers)})."
                " Chunks of sequences need one per block, whose experts stay in their slot."
            )
        for path, layer in layers:
            if isinstance(layer, MoE) and (reason := _depends_on_batch(layer)):
                raise ConfigError(
                    f"{name}.{path} can't be computed in chunks of sequences: {reason}, so a"
                    " token's experts depend on the whole batch."
                )


def _depends_on_batch(layer: MoE) -> str | None:
    traits = layer.router_traits
    if not traits.causal or traits.own_capacity:
        return f"{traits.name} compares tokens with each other"
    if layer.eval_capacity_factor is not None:
        return f"its capacity factor is {layer.eval_capacity_factor}"
    return None


def _final_norms(owner: nn.Module) -> Iterator[nn.Module]:
    """Norms over the last dimension next to the blocks."""
    for child in owner.children():
        if type(child).__name__.endswith(_NORMS):
            shape = getattr(child, "normalized_shape", (0,))
            if len(shape) == 1:
                yield child
