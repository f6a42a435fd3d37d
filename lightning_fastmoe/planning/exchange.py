"""Memory of the exchange of tokens: buffers, what layers keep of it, and what they work with.

T tokens of a rank, R ranks of the expert parallel group, S' rows that arrive at a rank, N
(row, slot) pairs that its experts compute, b bytes of an element. Sizes are those of balanced
routing and of the kernels for compute capability 9.0. Not counted: the workspace in which the
weights' gradients are split, which depends on the device (up to 80 MB in what was measured), and
counts of a few bytes for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_fastmoe.distributed.symmetric.exchange import MAX_SLOTS
from lightning_fastmoe.distributed.symmetric.flags import Flags
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.ops.exchange import ALIGNMENT, MAX_RANKS
from lightning_fastmoe.ops.exchange_counts import HEADER

_ID, _INDEX = 4, 8
"""Bytes of an expert's number that travels with a row, and of an entry of an order of rows."""
_GRANULE = 1 << 16
_HALVES = 2
_KINDS = 2
"""Of exchanges, each with flags of its own: counts and rows."""
_SLACK = 16


@dataclass(frozen=True)
class LayerShape:
    """A layer with sharded experts, and the tokens of a rank's micro-batch.

    Attributes:
        tokens: T.
        d_model: D.
        up_rows: rows of an expert's up projection, 2F for gated activations, else F.
        d_ffn: F.
        num_experts: E of the whole model.
        top_k: K.
        itemsize: b, bytes of an element of a token.
        dispatcher: a name of :data:`~lightning_fastmoe.nn.dispatch.DISPATCHERS`.
        exact: whether its numbers must have the bits of one process.
        has_biases: whether its experts have any.
    """

    tokens: int
    d_model: int
    up_rows: int
    d_ffn: int
    num_experts: int
    top_k: int
    itemsize: int
    dispatcher: str = "auto"
    exact: bool = False
    has_biases: bool = False

    @property
    def hidden(self) -> int:
        """Bytes of ``(T, D)``."""
        return self.tokens * self.d_model * self.itemsize

    @property
    def weight_bytes(self) -> int:
        """Of a slot's weight, which is in the accumulation dtype."""
        return max(4, self.itemsize)

    @property
    def returns_pairs(self) -> bool:
        """Whether experts on other ranks return a row for each slot instead of each token's sum."""
        return self.exact and self.top_k > 1

    @property
    def returned_itemsize(self) -> int:
        """Bytes of an element of these rows: biases are added in the accumulation dtype."""
        return self.weight_bytes if self.has_biases else self.itemsize

    def way(self, ranks: int) -> str:
        """The dispatcher over ``ranks`` ranks of one host, "local" for one rank.

        "auto" is taken to find GPUs that write to each other's memory, as those of a host do by
        NVLink; then it is "symmetric" if there is room for the counts of the layer's experts.
        """
        if ranks == 1:
            return "local"
        if self.dispatcher != "auto":
            return self.dispatcher
        has_room = self.num_experts + ranks + 1 <= MAX_SLOTS and ranks <= MAX_RANKS
        return "symmetric" if has_room else "dedup"


def layer_shapes(
    layers: Iterable[ExpertLayer], tokens: int, itemsize: int, *, exact: bool = False
) -> list[LayerShape]:
    """The shapes of the layers whose experts are FFNs; of modules nothing is known.

    Args:
        layers: in the order in which a forward pass reaches them.
        tokens: T.
        itemsize: b.
        exact: whether all must have the bits of one process, not only those that say so.
    """
    found = []
    for layer in layers:
        if (sizes := layer.experts.sizes) is not None:
            experts, top_k = layer.num_experts, layer.top_k or layer.num_experts
            how = layer.dispatcher_name, exact or layer.exact, layer.experts.has_biases
            found.append(LayerShape(tokens, *sizes, experts, top_k, itemsize, *how))
    return found


@dataclass(frozen=True)
class Arrival:
    """What a rank's experts get in a pass.

    Attributes:
        rows: S'; by "all_to_all" one for each pair.
        pairs: N.
    """

    rows: int
    pairs: int


def expected_arrival(layer: LayerShape, ranks: int) -> Arrival:
    """The mean over ranks, if each token chooses K different experts evenly.

    A token has no row for a rank if all its K experts are among the E - e of other ranks: C(E-e, K)
    of C(E, K) choices. R ranks send T tokens each, so ``S' = R T (1 - C(E-e, K) / C(E, K))``, of
    which each of R ranks gets the same. There are R T K pairs on R ranks, so ``N = T K``.
    """
    pairs = layer.tokens * layer.top_k
    if layer.way(ranks) == "all_to_all":
        return Arrival(pairs, pairs)
    experts, slots = layer.num_experts, layer.top_k
    elsewhere = math.comb(experts - experts // ranks, slots) / math.comb(experts, slots)
    return Arrival(round(ranks * layer.tokens * (1 - elsewhere)), pairs)


def launched_ahead(arrival: Arrival, top_k: int) -> Arrival:
    """What "symmetric" has memory for when it launches experts before the counts are known.

    A sixteenth more than came in the latest passes, and one; but at least one slot without an
    expert of this rank. Memory is kept whole, although only what came is saved.
    """
    rows = arrival.rows + arrival.rows // _SLACK + 1
    return Arrival(rows, min(arrival.pairs + arrival.pairs // _SLACK + 1, rows * top_k - 1))


def symmetric_capacity(layers: Iterable[LayerShape]) -> int:
    """Bytes of the block that each rank has for the rows of one other, after a forward pass.

    Of all exchanges of a layer, that of the tokens needs most: T rows of D elements, and with each
    the numbers and weights of K slots. All other rows are the same or those of the weights alone;
    but where a row comes back for each slot, all T*K may come from one rank, their gradients with
    one of a weight each. Each kind of row begins at a multiple of 16 bytes. A block that is too
    small for a layer grows to an eighth more than that layer needs, in steps of 64 KiB; so the
    order of layers counts.
    """
    capacity = 0
    for layer in layers:
        slots = layer.top_k * (_ID + layer.weight_bytes)
        row = _aligned(layer.d_model * layer.itemsize) + _aligned(slots)
        needed = max(layer.tokens, 1) * row
        if layer.returns_pairs:
            back = _aligned(layer.d_model * layer.returned_itemsize) + _aligned(layer.weight_bytes)
            needed = max(needed, max(layer.tokens * layer.top_k, 1) * back)
        if needed > capacity:
            capacity = math.ceil((needed + needed // 8) / _GRANULE) * _GRANULE
    return capacity


def symmetric_buffers(layers: Iterable[LayerShape], ranks: int) -> int:
    """Bytes of each rank that the others write to: one set for all layers of a model.

    Two halves, which exchanges use in turn, of a block for each rank; the same of tables of counts;
    and flags. None of it is in PyTorch's caching allocator.

    Args:
        layers: of the model, in order.
        ranks: R.
    """
    layers = [layer for layer in layers if layer.way(ranks) == "symmetric"]
    if not layers:
        return 0
    tables = 8 * (MAX_SLOTS + HEADER)
    flags = Flags.bytes_of(_HALVES * _KINDS, ranks)
    return _HALVES * ranks * (symmetric_capacity(layers) + tables) + flags


def kept_bytes(layer: LayerShape, ranks: int, arrival: Arrival, *, ahead: bool = True) -> int:
    """Bytes that the experts' part of a layer keeps for its backward pass.

    The layer's own x isn't counted: the router keeps it in any case.

    Args:
        layer: its shapes.
        ranks: R.
        arrival: what comes to this rank; as many rows are sent.
        ahead: whether "symmetric" launches experts ahead of the counts, as on GPUs in half
            precision, but not under ZeRO 3.
    """
    way, slots = layer.way(ranks), layer.top_k
    choices = layer.tokens * slots
    if way == "symmetric" and ahead and not layer.returns_pairs:
        arrival = launched_ahead(arrival, slots)
    rows, pairs = arrival.rows, arrival.pairs
    pre_activation = pairs * layer.up_rows * layer.itemsize
    row_bytes = layer.d_model * layer.itemsize
    if way == "local":
        # Order and inverse of the pairs; their weights.
        return pre_activation + pairs * 2 * _INDEX + choices * layer.weight_bytes
    if way == "all_to_all":
        # The experts' inputs, what returned (for the gradients of the weights), and two orders.
        both = pairs * (row_bytes + 2 * _INDEX) + choices * (row_bytes + 2 * _INDEX)
        return pre_activation + both + choices * layer.weight_bytes
    if layer.returns_pairs:
        # The experts' inputs with their weights, and the row, place and number of each; of the rows
        # that came only the order and inverse of all their slots.
        received = pairs * (row_bytes + layer.weight_bytes + 3 * _INDEX) + rows * slots * 2 * _INDEX
    else:
        # The rows that came with their weights, and the order and inverse of all their slots.
        received = rows * (row_bytes + slots * (layer.weight_bytes + 2 * _INDEX))
    if way == "symmetric":
        # Order and inverse of (token, rank) pairs, and each slot's rank.
        plan = layer.tokens * ranks * 2 * _INDEX + choices * _ID
    else:
        # The token of each row sent and its slots' experts; the row of each pair and of each slot.
        plan = rows * (_INDEX + slots * _ID) + layer.tokens * ranks * _INDEX + choices * _INDEX
        if layer.returns_pairs:
            # And what that was made from: each slot's rank and expert, order and inverse of pairs.
            plan += choices * 2 * _INDEX + layer.tokens * ranks * 2 * _INDEX
    return pre_activation + received + plan


def working_bytes(layer: LayerShape, ranks: int, arrival: Arrival, *, ahead: bool = True) -> int:
    """Bytes at the peak of the layer's forward or backward pass, beside :func:`kept_bytes`.

    Each line below is a moment. ``(T, D)`` is the output in the forward pass and its gradient in
    the backward pass; the activations of a rank's rows are A (N, F), and Y (N, D) what the down
    projection makes of them. In the backward pass, A' (N, F) is needed for the gradient of ``down``
    and dX (N, D) is summed to the gradients of S' rows, which "symmetric" keeps while they travel.

    Where a row comes back for each slot, the moments are derived from the code alone; those of the
    other ways were held against peaks that GPUs measured.

    Args:
        layer: its shapes.
        ranks: R.
        arrival: what comes to this rank; as many rows are sent.
        ahead: as in :func:`kept_bytes`.
    """
    way, b, out = layer.way(ranks), layer.itemsize, layer.hidden
    local_experts = layer.num_experts // ranks if way != "local" else layer.num_experts
    d_up = local_experts * layer.up_rows * layer.d_model * b
    d_down = local_experts * layer.d_model * layer.d_ffn * b
    if layer.returns_pairs and way in ("symmetric", "dedup"):
        return _working_by_pair(layer, way, arrival, d_up, d_down)
    first = launched_ahead(arrival, layer.top_k) if way == "symmetric" and ahead else arrival
    a, y = (first.pairs * width * b for width in (layer.d_ffn, layer.d_model))
    sums = first.rows * layer.d_model * b
    weighted, d_rows = (arrival.pairs * width * b for width in (layer.d_ffn, layer.d_model))
    rows = arrival.rows * layer.d_model * b  # of gradients: (S', D)
    if way == "local":
        moments = [
            a + y,
            y + out,
            out + weighted + d_down,
            out + d_down + d_rows + out,
            out + d_down + out + d_up,
        ]
    elif way == "symmetric":
        moments = [
            a + y,
            y + sums,
            out + rows + weighted + d_down,
            out + d_down + d_rows + rows,
            out + d_down + rows + d_up + out,
        ]
    elif way == "all_to_all":
        returned = layer.tokens * layer.top_k * layer.d_model * b
        moments = [
            a + y,
            y + y + out,  # beside what returned: Y by expert and by rank
            out + d_rows + weighted + d_down - returned,
            out + d_rows + d_down + d_rows + d_up - returned,
        ]
    else:
        moments = [
            rows,  # sent while the others' arrive
            a + y,
            y + sums,
            sums + rows + out,
            out + rows + weighted + d_down,
            out + rows + d_down + d_rows + rows,
            out + rows + d_down + rows + d_up,
        ]
        if way == "dedup_overlapped":
            kept = kept_bytes(layer, ranks, arrival)
            moments = [
                rows + (a + y) // 2,
                sums + rows + out,
                # The first half computes while the second's gradients have come.
                out + rows + rows // 2 + d_down + (d_rows + rows) // 2,
                # The second, beside the weights' gradients of the first and what that sends.
                out + d_up + d_down + d_down + max(d_up, d_rows // 2) + 2 * rows - kept // 2,
            ]
    return max(moments)


def _working_by_pair(layer: LayerShape, way: str, arrival: Arrival, d_up: int, d_down: int) -> int:
    """:func:`working_bytes` where a row comes back for each slot, way "symmetric" or "dedup".

    Experts get X (N, D), a copy of a token for each pair. Biases, which separate operations add,
    make Y one of the accumulation dtype. "dedup" copies what it sends. The arrival of the tokens is
    no peak, since X and H aren't there yet.

    Args:
        layer: its shapes.
        way: its dispatcher.
        arrival: what comes to this rank.
        d_up: bytes of the gradient of the up projections.
        d_down: of the down projections.
    """
    b, wide, out = layer.itemsize, layer.returned_itemsize, layer.hidden
    x, y = (arrival.pairs * layer.d_model * size for size in (b, wide))
    rows, activations = arrival.rows * layer.d_model * b, arrival.pairs * layer.d_ffn * b
    h = arrival.pairs * layer.up_rows * b
    returned = layer.top_k * out  # of slots: (T, K, D)
    widened, sums = (y, out * wide // b + out) if wide > b else (0, out)
    copied_x, copied_y = (x, y) if way == "dedup" else (0, 0)
    # Y without bias as it was and wide, the rows of the bias, and the sum; a second dX.
    biased, unordered = (3 * y + (x if widened else 0), x) if layer.has_biases else (0, 0)
    grads = x + widened  # of Y, as it came and as kernels take it
    return max(
        activations + x,
        biased,
        y + returned * wide // b + max(copied_y, sums),  # sent back, then summed
        out + rows + grads,  # a row for each token has come, and is copied for each pair
        out + grads + activations + d_down,
        out + grads + d_down + x + max(unordered, d_up),
        # The experts' node is done: H and X are freed, and the gradient of X is as large.
        out + d_down + d_up - h + returned + max(copied_x, out),
    )


@dataclass(frozen=True)
class ExchangePlan:
    """What the exchange of all layers of a model takes at an expert parallel size.

    Attributes:
        layers: of the model, in order.
        ranks: R.
    """

    layers: Sequence[LayerShape]
    ranks: int

    @property
    def buffers(self) -> int:
        """Bytes that are there for the whole run, see :func:`symmetric_buffers`."""
        return symmetric_buffers(self.layers, self.ranks)

    @property
    def kept(self) -> list[int]:
        """Bytes that each layer keeps more for its backward pass than with all experts here."""
        return [self._kept(layer, self.ranks) - self._kept(layer, 1) for layer in self.layers]

    @property
    def working(self) -> int:
        """Bytes of the largest layer while it computes, see :func:`working_bytes`."""
        return max((self._working(layer) for layer in self.layers), default=0)

    @property
    def ways(self) -> str:
        """The dispatchers of the layers, for people."""
        return ", ".join(dict.fromkeys(f'"{layer.way(self.ranks)}"' for layer in self.layers))

    def _kept(self, layer: LayerShape, ranks: int) -> int:
        return kept_bytes(layer, ranks, expected_arrival(layer, ranks))

    def _working(self, layer: LayerShape) -> int:
        return working_bytes(layer, self.ranks, expected_arrival(layer, self.ranks))


def _aligned(width: int) -> int:
    return math.ceil(width / ALIGNMENT) * ALIGNMENT
