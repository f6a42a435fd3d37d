"""Random numbers keyed by (seed, stream, token, column): identical on any topology and device.

A counter-based generator has no state, so a token's numbers don't depend on which rank, micro-batch
or replay draws them (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The mixing
function is SplitMix64's (Steele et al. 2014) in wrapping int64 arithmetic, which gives the same
result on every device.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.global_batch import GlobalBatch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 24
_MAX_PASSES = 4096


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of ``value``."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def random_bits(seed: int, stream: int, tokens: Tensor, columns: int) -> Tensor:
    """64 random bits for each token and column.

    Args:
        seed: any integer; only its lowest 64 bits matter.
        stream: distinguishes draws for different purposes.
        tokens: (T,) int64, the tokens' numbers.
        columns: draws per token.

    Returns:
        (T, columns) int64.
    """
    steps = torch.arange(1, columns + 1, dtype=torch.int64, device=tokens.device)
    key = _signed(seed + (stream + 1) * _MIX_2)
    start = _mix(_mix(tokens * _signed(_GOLDEN) + key) + key)
    return _mix(start.unsqueeze(1) + steps * _signed(_GOLDEN))


def uniform(seed: int, stream: int, tokens: Tensor, columns: int) -> Tensor:
    """(T, columns) fp32 multiples of 2^-24 in [0, 1); arguments as for :func:`random_bits`."""
    bits = _shift(random_bits(seed, stream, tokens, columns), 64 - _BITS)
    return bits.to(torch.float32) * 2.0**-_BITS


def normal_from_uniform(u: Tensor) -> Tensor:
    """Standard normal numbers from :func:`uniform` ones, by the inverse distribution function."""
    middle = u.to(torch.float64) + 2.0 ** -(_BITS + 1)
    z: Tensor = torch.special.ndtri(middle)
    return z.to(u.dtype)


class PassNumbers:
    """Remembers each forward pass's first token number, for when checkpointing replays the pass.

    Activation checkpointing restores the state of torch's CPU generator for a replay. Each pass
    draws its name from that generator, so a replay draws the same name.
    """

    def __init__(self) -> None:
        self._first: OrderedDict[int, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type[PassNumbers], tuple[()]]:
        """Starts empty when copied or unpickled: a copy has run no pass of its own yet."""
        return PassNumbers, ()

    @staticmethod
    def name() -> int:
        """Draws the name of the pass that is starting or being replayed."""
        return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))

    def first_token(
        self, seen: Tensor, tokens: int, batch: GlobalBatch, layer: str, *, replay: bool
    ) -> Tensor:
        """The number of a pass's first token, over all ranks since training began.

        Args:
            seen: int64 scalar, the tokens before this pass; advanced in place unless replayed.
            tokens: this rank's number of tokens in this pass.
            batch: access to the other ranks' tokens.
            layer: for errors.
            replay: activation checkpointing is repeating the pass.
        """
        name = self.name()
        if replay:
            return self.find(name, layer)
        own = torch.full((1,), tokens, dtype=torch.int64, device=seen.device)
        table = batch.gather_counts(own, layer).to(seen.device)
        first = seen + table[: batch.rank].sum()
        seen += table.sum()
        self.store(name, first)
        return first

    def store(self, name: int, first: Tensor) -> None:
        """Stores the number of a pass's first token."""
        self._first[name] = first
        while len(self._first) > _MAX_PASSES:
            self._first.popitem(last=False)

    def find(self, name: int, layer: str) -> Tensor:
        """The number of the first token of the pass being replayed.

        Raises:
            ConfigError: if the pass is unknown.
        """
        if name not in self._first:
            raise ConfigError(
                f"{layer}: activation checkpointing replays a forward pass, but without its random"
                " state, so the router can't draw the same numbers again. Use"
                " checkpoint(..., preserve_rng_state=True), or a router without random numbers."
            )
        return self._first[name]
