"""The least time that each kernel of a layer can take on a device.

A kernel's floor is ``max(FLOPs / dense rate, bytes / copy rate)``, with both rates measured on the
same device in the same run. Bytes are what must cross the device's memory if every operand is read
once and every result written once: a gather reads each source row once, however often it is used.
Tokens and experts take 2 bytes per element, routing weights 4, indices and counts 8, offsets 4.

N = T*K rows, U = 2F for gated experts, else F. Only the weights of experts with tokens are read,
but the gradient of every expert is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layer.configs import Config


@dataclass(frozen=True)
class Work:
    """What a kernel must do.

    Attributes:
        flops: 2 per multiply-add of a matrix product; nothing else is counted.
        bytes: read and written.
    """

    flops: int
    bytes: int

    def floor_us(self, rates: Rates) -> float:
        """The least time in microseconds."""
        return max(self.flops / rates.dense_tflops / 1e6, self.bytes / rates.copy_gbs / 1e3)

    def bound(self, rates: Rates) -> str:
        """Which of the two sets the floor: "compute" or "memory"."""
        compute, memory = self.flops / rates.dense_tflops / 1e6, self.bytes / rates.copy_gbs / 1e3
        return "compute" if compute > memory else "memory"

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Rates:
    """What the device does.

    Attributes:
        dense_tflops: throughput of a large dense bf16 product.
        copy_gbs: bandwidth of a large copy, counting both reads and writes.
    """

    dense_tflops: float
    copy_gbs: float


@dataclass(frozen=True)
class Sizes:
    """A configuration under one routing, in the letters of the formulas.

    Attributes:
        t, d, f, e, k: T, D, F, E, K.
        u: rows of one expert's up projection.
        busy: experts with tokens.
    """

    t: int
    d: int
    f: int
    e: int
    k: int
    u: int
    busy: int

    @property
    def n(self) -> int:
        """Rows of all experts."""
        return self.t * self.k

    @staticmethod
    def of(config: Config, busy: int | None = None) -> Sizes:
        """The sizes of ``config``; ``busy`` None means that all experts have tokens."""
        u = (2 if config.gated else 1) * config.d_ffn
        experts = config.num_experts
        return Sizes(
            t=config.tokens,
            d=config.d_model,
            f=config.d_ffn,
            e=experts,
            k=config.top_k,
            u=u,
            busy=experts if busy is None else busy,
        )


Floor = Callable[[Sizes], Work]
"""What a kernel must do at given sizes."""


def router(s: Sizes) -> Work:
    """Tokens times the fp32 router; scores, weights and expert ids are written."""
    return Work(2 * s.t * s.d * s.e, 2 * s.t * s.d + 4 * s.e * s.d + 4 * s.t * s.e + 12 * s.n)


def router_losses(s: Sizes) -> Work:
    """Scores and ids are read for the losses, and the gradient of the scores is written."""
    return Work(0, 8 * s.t * s.e + 8 * s.n)


def router_backward(s: Sizes) -> Work:
    """Gradients of the router and of the tokens from that of the weights and scores."""
    moved = 4 * s.t * s.e + 12 * s.n + 4 * s.t * s.d + 8 * s.e * s.d
    return Work(4 * s.t * s.d * s.e, moved)


def sort(s: Sizes) -> Work:
    """Ids in; order, inverse, counts and offsets out."""
    return Work(0, 24 * s.n + 12 * s.e)


def permute(s: Sizes) -> Work:
    """Each token once in, each row once out, one index per row."""
    return Work(0, 2 * (s.t + s.n) * s.d + 8 * s.n)


def up_product(s: Sizes) -> Work:
    """(N, D) rows times up, forward."""
    return Work(2 * s.n * s.d * s.u, 2 * (s.n * s.d + s.busy * s.u * s.d + s.n * s.u))


def activation(s: Sizes) -> Work:
    """(N, U) in, (N, F) out."""
    return Work(0, 2 * s.n * (s.u + s.f))


def down_product(s: Sizes) -> Work:
    """(N, F) rows times down, forward; the gradient of the activation costs the same."""
    return Work(2 * s.n * s.d * s.f, 2 * (s.n * s.f + s.busy * s.d * s.f + s.n * s.d))


def weighted_sum(s: Sizes) -> Work:
    """(N, D) rows, their indices and weights in, (T, D) out."""
    return Work(0, 2 * (s.n + s.t) * s.d + 12 * s.n)


def plain_sum(s: Sizes) -> Work:
    """As :func:`weighted_sum` without weights."""
    return Work(0, 2 * (s.n + s.t) * s.d + 8 * s.n)


def activation_backward(s: Sizes) -> Work:
    """H, the gradient of A, order and weights in; dH, weighted A and dw out."""
    return Work(0, 2 * s.n * (2 * s.u + 2 * s.f) + 16 * s.n)


def down_gradient(s: Sizes) -> Work:
    """(N, D) and (N, F) in, (E, D, F) out."""
    return Work(2 * s.n * s.d * s.f, 2 * (s.n * s.d + s.n * s.f + s.e * s.d * s.f))


def up_gradient(s: Sizes) -> Work:
    """(N, U) and (N, D) in, (E, U, D) out."""
    return Work(2 * s.n * s.d * s.u, 2 * (s.n * s.d + s.n * s.u + s.e * s.u * s.d))


def rows_gradient(s: Sizes) -> Work:
    """(N, U) rows times up, (N, D) out."""
    return up_product(s)


def fused_up(s: Sizes) -> Work:
    """Tokens gathered, times up; H and A are written."""
    moved = 2 * (s.t * s.d + s.busy * s.u * s.d + s.n * s.u + s.n * s.f) + 8 * s.n
    return Work(2 * s.n * s.d * s.u, moved)


def fused_down_backward(s: Sizes) -> Work:
    """The gradient gathered, times down, and H; dH, weighted A and dw are written."""
    moved = 2 * (s.t * s.d + s.busy * s.d * s.f + 2 * s.n * s.u + s.n * s.f) + 16 * s.n
    return Work(2 * s.n * s.d * s.f, moved)


def gathered_down_gradient(s: Sizes) -> Work:
    """As :func:`down_gradient`, with the layer's gradient gathered."""
    return Work(2 * s.n * s.d * s.f, 2 * (s.t * s.d + s.n * s.f + s.e * s.d * s.f) + 8 * s.n)


def gathered_up_gradient(s: Sizes) -> Work:
    """As :func:`up_gradient`, with the tokens gathered."""
    return Work(2 * s.n * s.d * s.u, 2 * (s.t * s.d + s.n * s.u + s.e * s.u * s.d) + 8 * s.n)


def empty_experts(s: Sizes) -> Work:
    """Counts are read, the gradients of experts without tokens written; of both matrices' mean."""
    return Work(0, 8 * s.e + (s.e - s.busy) * s.d * (s.u + s.f))


def whole_layer(s: Sizes) -> Work:
    """Forward and backward of a layer that keeps only x and H and gathers inside its products.

    It reads and writes, beyond the weights (read twice) and their gradients (written once):

    * tokens, six times T*D: x and the output, x again for the gradient of up, the output's gradient
      for that of A and again for that of down, and the gradient of x;
    * H and dH: H written and read, dH written and read twice, five times N*U;
    * A: written and read, and the weighted A likewise, four times N*F.

    Rows that the down projection and the gradient of x leave in memory before each token sums its K
    are not counted: that is what a better layer could save.
    """
    flops = 6 * s.n * s.d * (s.u + s.f)
    matrices = s.d * (s.u + s.f)
    moved = 2 * (2 * s.busy + s.e) * matrices + 12 * s.t * s.d + 10 * s.n * s.u + 8 * s.n * s.f
    return Work(flops, moved)
