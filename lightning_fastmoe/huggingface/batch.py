"""Reads batches of token ids with padding and packed documents, in transformers' conventions.

The keys are read and checked on the host once per batch, not in each layer; a batch with neither
padding nor packing runs as if it had none of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import DataError, ShapeError

IGNORED = -100
"""The label of tokens that are not predicted, as in transformers."""

PER_TOKEN = ("attention_mask", "position_ids", "seq_idx")
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
KEYS = ("input_ids", "labels", *PER_TOKEN, *BOUNDARIES, *LONGEST)
"""The keys that a batch may have. ``DataCollatorWithFlattening`` adds the last four."""


@dataclass(frozen=True)
class Layout:
    """The sequences of a batch. A sequence is a document, or a whole row.

    Attributes:
        sequence_ids: (batch, seq_len) int64, ascending over the batch; -1 for padding.
        positions: (batch, seq_len) int64, each token's position in its sequence; 0 for padding.
        real: (N,) int64, indices of the non-padding tokens in the flattened batch; None without
            padding.
        crossing: whether a row has tokens before a sequence that the sequence must not see, so
            that causal attention alone is not enough.
        real_sequence_ids: (N,) int64, the sequences of the non-padding tokens.
    """

    sequence_ids: Tensor
    positions: Tensor
    real: Tensor | None
    crossing: bool
    # Computed here rather than when first read: dynamo breaks the graph of a layer that computes
    # a cached property.
    real_sequence_ids: Tensor = field(init=False)
    _mask: list[Tensor | None] = field(init=False, default_factory=list, repr=False)
    _parts: dict[tuple[int, int], Layout] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        ids = self.sequence_ids.flatten()
        present = ids if self.real is None else ids.index_select(0, self.real)
        object.__setattr__(self, "real_sequence_ids", present)

    @property
    def attention_mask(self) -> Tensor | None:
        """(batch, 1, seq_len, seq_len) bool, True where a query sees a key; None if causal."""
        if self._mask:
            return self._mask[0]
        if not self.crossing:
            # Only padding sees padding on the right.
            return None
        ids = self.sequence_ids
        # Padding sees padding, because a softmax over no keys would be NaN.
        return (ids.unsqueeze(2) == ids.unsqueeze(1)).tril().unsqueeze(1)

    def keep_mask(self) -> None:
        """Keeps :attr:`attention_mask`, which is computed at each use otherwise."""
        if not self._mask:
            self._mask.append(self.attention_mask)

    def rows(self, start: int, stop: int) -> Layout:
        """The sequences of rows ``start`` to ``stop``; all layers of a pass share it."""
        found = self._parts.get((start, stop))
        if found is None:
            ids = self.sequence_ids[start:stop]
            real = None if self.real is None else (ids.flatten() >= 0).nonzero().flatten()
            found = Layout(ids, self.positions[start:stop], real, self.crossing)
            found.keep_mask()
            self._parts[start, stop] = found
        return found


@dataclass(frozen=True)
class TokenBatch:
    """A parsed batch of the data loader.

    Attributes:
        tokens: (batch, seq_len), any integer dtype.
        targets: (batch, seq_len - 1) int64: the next token's label; :data:`IGNORED` where the next
            token is padding, follows padding, or starts a document.
        layout: the sequences; None without padding and packing.
    """

    tokens: Tensor
    targets: Tensor
    layout: Layout | None


def read_batch(batch: Tensor | Mapping[str, Any]) -> TokenBatch:
    """Reads token ids, or a mapping with the keys of :data:`KEYS`; values of None are ignored.

    Raises:
        DataError: if a key is unknown or missing, or values contradict each other.
        ShapeError: if a value has the wrong shape or dtype.
    """
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if unknown := sorted(str(key) for key in given if key not in KEYS):
        raise DataError(
            f"The batch has {', '.join(unknown)}, which MoECausalLM does not support. It may"
            f" have: {', '.join(KEYS)}. Drop the others in the data set or the collate function."
        )
    given = {key: value for key, value in given.items() if value is not None}
    if "input_ids" not in given:
        raise DataError(
            f"The batch has no input_ids, only: {', '.join(given) or 'nothing'}. A batch is token"
            " ids (batch, seq_len), or a mapping with at least input_ids."
        )
    tokens = given.pop("input_ids")
    _check("input_ids", tokens)
    labels = given.pop("labels", tokens)
    _check("labels", labels, tuple(tokens.shape))
    layout = read_layout(tokens, given)
    targets = labels[:, 1:].long()
    if layout is not None:
        ids = layout.sequence_ids
        inside = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        targets = targets.masked_fill(~inside, IGNORED)
    return TokenBatch(tokens, targets, layout)


def read_layout(tokens: Tensor, given: Mapping[str, Any]) -> Layout | None:
    """The sequences of ``tokens (batch, seq_len)``, or None if each fills its row.

    Args:
        tokens: token ids.
        given: the other keys of the batch: ``attention_mask``, 1 for a token and 0 for padding, at
            either end of a row; ``position_ids``, which restart from 0 with each document;
            ``seq_idx``, a different number for each document of a row; ``cu_seq_lens_q`` and
            ``_k``, the boundaries of the documents of a single row; ``max_length_q`` and ``_k``,
            the longest document's length. Those that are given must agree.

    Raises:
        DataError: if values break these rules.
        ShapeError: if a value has the wrong shape or dtype.
    """
    if not given or not tokens.numel():
        return None
    shape = tuple(tokens.shape)
    for key in PER_TOKEN:
        if key in given:
            # transformers' models create position_ids (1, seq_len) for all rows.
            lead = {shape, (1, shape[1])} if key == "position_ids" else {shape}
            _check(key, given[key], *sorted(lead, reverse=True), boolean=key == "attention_mask")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    begins = _begins_of_each_key(real, given)
    facts = _Facts.read(real, begins, given)
    facts.check(given)
    first = next(iter(begins.values()))
    if not (facts.padded or facts.crossing or facts.shifted):
        return None
    if positions is None:
        indices = torch.arange(shape[1], device=tokens.device).expand(shape)
        positions = indices - indices.where(first, 0).cummax(dim=1).values
    return Layout(
        sequence_ids=(first.flatten().cumsum(0) - 1).view(shape).masked_fill(~real, -1),
        positions=positions.long().expand(shape).masked_fill(~real, 0),
        real=torch.nonzero(real.flatten()).squeeze(1) if facts.padded else None,
        crossing=facts.crossing,
    )


def _begins_of_each_key(real: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Key -> (batch, seq_len) bool, the first tokens of sequences according to this key."""
    after_padding = real.clone()
    after_padding[:, 1:] &= ~real[:, :-1]
    found = {}
    if "position_ids" in given:
        positions = given["position_ids"].long().expand(real.shape)
        jumps = torch.zeros_like(real)
        jumps[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        found["position_ids"] = after_padding | (real & jumps)
    if "seq_idx" in given:
        ids = given["seq_idx"]
        changes = torch.zeros_like(real)
        changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
        found["seq_idx"] = after_padding | (real & changes)
    for key in BOUNDARIES:
        if key in given:
            begins = torch.zeros_like(real)
            begins[0, _read_boundaries(key, given[key], real)] = True
            found[key] = begins
    # A mask says nothing about documents, so it can't contradict the other keys.
    return found or {"attention_mask": after_padding}


def _read_boundaries(key: str, bounds: Any, real: Tensor) -> list[int]:
    """The starts of the documents of a single row, from ``cu_seq_lens (documents + 1,)``."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or not _is_integer(bounds):
        raise ShapeError(
            f"{key} is {_describe(bounds)}. It must be a tensor (documents + 1,) of an integer"
            " dtype, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes it."
        )
    values, total = bounds.tolist(), real.shape[1]
    ascending = all(a <= b for a, b in zip(values, values[1:], strict=False))
    if real.shape[0] != 1 or len(values) < 2 or (values[0], values[-1]) != (0, total):
        raise DataError(
            f"{key} goes from {values[0] if values else None} to {values[-1] if values else None},"
            f" but input_ids are {tuple(real.shape)}. It holds the boundaries of the documents of a"
            " single row (1, total), from 0 to total. For several rows give position_ids."
        )
    if not ascending:
        raise DataError(f"{key}={values} descends. A document begins where the last one ends.")
    return sorted({begin for begin in values[:-1] if begin < total})


def _read_length(key: str, value: Any) -> int:
    one = isinstance(value, Tensor) and value.numel() == 1 and _is_integer(value)
    if not one and (not isinstance(value, int) or isinstance(value, bool)):
        raise ShapeError(f"{key} is {_describe(value)}. It must be an integer.")
    return int(value)


@dataclass(frozen=True)
class _Facts:
    """What the host needs to know about a batch: flags read from the device.

    Attributes:
        padded: whether any token is padding.
        crossing: whether any sequence starts after the first token of its row.
        shifted: whether any row's positions start above 0.
        not_binary: whether the mask has values other than 0 and 1.
        holes: whether there is padding between the tokens of a row.
        bad_positions: whether positions neither count up nor restart from 0.
        longest: length of the longest sequence.
        disagreeing: keys whose documents differ from those of the first key.
    """

    padded: bool
    crossing: bool
    shifted: bool
    not_binary: bool
    holes: bool
    bad_positions: bool
    longest: int
    disagreeing: list[str]

    @classmethod
    def read(cls, real: Tensor, begins: dict[str, Tensor], given: Mapping[str, Any]) -> _Facts:
        """Reads the flags from the device, in one sync."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        first = next(iter(begins.values()))
        never = torch.zeros((), dtype=torch.bool, device=real.device)
        edges = real[:, 1:] & ~real[:, :-1]
        runs = edges.sum(dim=1) + real[:, 0]
        shifted = bad = never
        if positions is not None:
            positions = positions.long().expand(real.shape)
            begin = first & (positions != 0)
            # A row may start at any position, since rotary positions are relative. Later documents
            # must start at 0, since anything else could also be a gap.
            opening = real & (real.cumsum(dim=1) == 1)
            shifted = (begin & opening).any()
            bad = (begin & ~opening).any() | (real & (positions < 0)).any()
        numbers = (first.flatten().cumsum(0) - 1).masked_fill(~real.flatten(), real.numel())
        lengths = torch.zeros(real.numel() + 1, dtype=torch.int64, device=real.device)
        lengths = lengths.scatter_add_(0, numbers, torch.ones_like(numbers))[:-1]
        flags = [
            ~real.all(),
            first[:, 1:].any(),
            shifted,
            never if mask is None else ((mask != 0) & (mask != 1)).any(),
            (runs > 1).any(),
            bad,
            lengths.max(),
            *((other != first).any() for other in begins.values()),
        ]
        found = torch.stack([flag.long() for flag in flags]).tolist()
        disagreeing = [key for key, other in zip(begins, found[7:], strict=True) if other]
        padded, crossing, shifts, not_binary, holes, wrong = map(bool, found[:6])
        return cls(padded, crossing, shifts, not_binary, holes, wrong, found[6], disagreeing)

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuses values that break the keys' rules.

        Raises:
            DataError: naming the key.
        """
        if self.not_binary:
            raise DataError(
                "attention_mask has values other than 0 and 1. It is 1 for a token and 0 for"
                " padding; to pack documents into a row, give position_ids or seq_idx."
            )
        if self.holes:
            raise DataError(
                "attention_mask has zeros between the ones of a row. Padding must come before or"
                " after a row's tokens; remove tokens in between in the data set, or give them the"
                " label -100 if they should only be excluded from the loss."
            )
        if self.bad_positions:
            raise DataError(
                "position_ids neither count up by 1 nor restart from 0 at some token. They must"
                " count up within a document, and restart from 0 for each further document of a"
                " row. Correct them, or leave position_ids out."
            )
        if self.padded and (mixed := [key for key in BOUNDARIES if key in given]):
            raise DataError(
                f"attention_mask has padding, but {mixed[0]} is for rows without padding. Use one"
                " of them."
            )
        if self.disagreeing:
            first = next(key for key in ("position_ids", "seq_idx", *BOUNDARIES) if key in given)
            raise DataError(
                f"{first} and {self.disagreeing[0]} start documents at different tokens. They must"
                " agree; give only one of them."
            )
        for key in LONGEST:
            if key in given and (said := _read_length(key, given[key])) != self.longest:
                raise DataError(
                    f"{key} is {said}, but the longest sequence of the batch has"
                    f" {self.longest} tokens. Correct it, or leave it out: it is not needed."
                )


def _check(key: str, value: Any, *shapes: tuple[int, ...], boolean: bool = False) -> None:
    """Refuses shapes other than these, and dtypes that are not integers.

    Raises:
        ShapeError: naming the key.
    """
    good = isinstance(value, Tensor) and (_is_integer(value) or (boolean and _is_bool(value)))
    fits = good and (value.dim() == 2 if not shapes else tuple(value.shape) in shapes)
    if fits:
        return
    shape = f"of shape {' or '.join(map(str, shapes))}" if shapes else "(batch, seq_len)"
    hint = ""
    if boolean:
        hint = (
            " 4-dimensional or floating-point attention masks are not supported: give 1 for each"
            " token and 0 for padding, and position_ids to separate documents."
        )
    raise ShapeError(
        f"{key} is {_describe(value)}. It must be a tensor {shape} of"
        f" {'bool or ' if boolean else ''}an integer dtype.{hint}"
    )


def _is_bool(value: Tensor) -> bool:
    return value.dtype == torch.bool


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or _is_bool(value))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
