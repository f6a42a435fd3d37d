"""The colour scale of load ratios for all pictures.

Orange is starving, white balanced, blue overloaded. Orange and blue remain distinguishable with
every common colour blindness, and both ends are dark in greyscale. The scale is logarithmic: half
the mean load is as far from white as twice the mean.
"""

from __future__ import annotations

import math

Colour = tuple[int, int, int]

DEAD: Colour = (26, 26, 26)
"""No token at all."""
UNKNOWN: Colour = (232, 232, 232)
"""No data, or no such expert."""
LIMIT = 4.0
"""Ratios are clamped to 1 / LIMIT and LIMIT."""

_STARVING: list[Colour] = [(247, 247, 245), (253, 208, 162), (241, 132, 50), (173, 66, 3)]
_CROWDED: list[Colour] = [(247, 247, 245), (178, 212, 236), (78, 149, 206), (12, 78, 148)]


def colour(ratio: float | None) -> Colour:
    """The colour of a load ratio; None is unknown, 0 is dead."""
    if ratio is None or math.isnan(ratio):
        return UNKNOWN
    if ratio <= 0:
        return DEAD
    place = max(-1.0, min(1.0, math.log(ratio) / math.log(LIMIT)))
    return _on_ramp(_STARVING if place < 0 else _CROWDED, abs(place))


def _on_ramp(ramp: list[Colour], place: float) -> Colour:
    at = place * (len(ramp) - 1)
    low = min(int(at), len(ramp) - 2)
    share = at - low
    red, green, blue = (
        round(a + share * (b - a)) for a, b in zip(ramp[low], ramp[low + 1], strict=True)
    )
    return red, green, blue


def share_colour(share: float | None) -> Colour:
    """From white for 0 to dark blue for 1; None is unknown."""
    if share is None:
        return UNKNOWN
    return _on_ramp(_CROWDED, max(0.0, min(1.0, share)))


def hex_colour(ratio: float | None) -> str:
    """:func:`colour` as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour(ratio))


def ink(ratio: float | None) -> str:
    """Black or white, whichever is more readable on :func:`colour`."""
    red, green, blue = (_linear(x / 255) for x in colour(ratio))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if luminance < 0.18 else "#1a1a1a"


def _linear(x: float) -> float:
    return x / 12.92 if x <= 0.04045 else float(((x + 0.055) / 1.055) ** 2.4)
