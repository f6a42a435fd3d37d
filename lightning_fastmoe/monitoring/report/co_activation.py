"""Which experts are chosen together: a heat map per layer, and its strongest pair in words."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightning_fastmoe.monitoring.logs.co_activation import shares
from lightning_fastmoe.monitoring.report.colours import share_colour
from lightning_fastmoe.monitoring.report.svg import png, wrap_svg
from lightning_fastmoe.monitoring.report.verdict import STARVING

WIDTH = 300.0


@dataclass(frozen=True)
class Pair:
    """Two experts of one layer.

    Attributes:
        first: an expert.
        second: another one.
        share: the fraction of the first one's tokens that also chose the second.
        expected: the fraction if tokens chose the second independently of the first, equally often.
    """

    first: int
    second: int
    share: float
    expected: float

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of expert {self.first}'s tokens also chose {self.second};"
            f" by chance {self.expected:.0%}"
        )


def strongest_pair(together: Sequence[Sequence[int]]) -> Pair | None:
    """The pair with the largest share; None if no token chose two experts.

    Starving experts are not considered as the first of a pair: they have too few tokens.

    Args:
        together: (E, E) counts, see :mod:`lightning_fastmoe.monitoring.logs.co_activation`.
    """
    enough = STARVING * sum(row[i] for i, row in enumerate(together)) / len(together)
    best: tuple[float, int, int] | None = None
    for i, row in enumerate(shares(together)):
        for j, share in enumerate(row):
            if share and together[i][i] >= enough and (best is None or share > best[0]):
                best = (share, i, j)
    if best is None:
        return None
    share, i, j = best
    # The other choices of i's tokens, distributed over the other experts by their loads.
    others = sum(n for e, n in enumerate(together[i]) if e != i) / together[i][i]
    loads = [row[e] for e, row in enumerate(together)]
    return Pair(i, j, share, min(1.0, others * loads[j] / (sum(loads) - loads[i])))


def co_activation_map(together: Sequence[Sequence[int]], *, title: str) -> str:
    """An inline SVG, one cell per pair of experts; grey on the diagonal and for dead experts.

    Args:
        together: (E, E) counts.
        title: for screen readers.
    """
    rows = shares(together)
    experts = len(rows)
    left, top, right, bottom = 34.0, 4.0, 6.0, 22.0
    side = WIDTH - left - right
    cell = side / experts
    picture = base64.b64encode(png([[share_colour(x) for x in row] for row in rows])).decode()
    parts = [
        f'<image x="{left}" y="{top}" width="{side}" height="{side}" preserveAspectRatio="none"'
        ' style="image-rendering:pixelated"'
        f' href="data:image/png;base64,{picture}"><title>{escape(title)}</title></image>',
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#b7bcc4"/>',
    ]
    for e in range(0, experts, math.ceil(14 / cell)):
        y = top + (e + 0.5) * cell + 3.5
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{e}</text>')
    for e in range(0, experts, math.ceil(28 / cell)):
        x, y = left + (e + 0.5) * cell, top + side + 15
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{e}</text>')
    return wrap_svg(WIDTH, top + side + bottom, title, parts)
