"""Charts as inline SVG: lines over steps, and heat maps of load ratios."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lightning_fastmoe.monitoring.report.colours import colour, hex_colour, ink
from lightning_fastmoe.monitoring.report.logs import Series, finite

PALETTE = ("#0c4e94", "#d9661f", "#3f8f6b", "#8a5aa8", "#7a7a7a", "#b0882b")
"""Line colours; readable on white, and distinguishable with every common colour blindness."""
INK = "#5c6370"
GRID = "#e6e8eb"
MOST_POINTS = 400
"""Maximum points of a line; longer series are thinned to the extremes of each interval."""


def number(value: float) -> str:
    """A number as a short string."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers between ``low`` and ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """The drawing area of a chart and its scales."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46.0
    right: float = 12.0
    top: float = 8.0
    bottom: float = 22.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The position of a data point in the picture."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        width = self.width - self.left - self.right
        height = self.height - self.top - self.bottom
        return self.left + across * width, self.top + (1.0 - up) * height


def line_chart(
    lines: Mapping[str, Series],
    *,
    title: str,
    zero: bool = False,
    percent: bool = False,
    width: float = 420.0,
    height: float = 200.0,
) -> str:
    """Lines over steps, with a legend if there are several.

    Args:
        lines: label -> points; at least one finite point in total.
        title: for screen readers.
        zero: start the scale at 0.
        percent: show values as percentages.
        width: the width of the picture, in its own units.
        height: the height of the picture, in its own units.
    """
    lines = {name: points for name, series in lines.items() if (points := finite(series))}
    values = [v for series in lines.values() for _, v in series]
    steps = [s for series in lines.values() for s, _ in series]
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(high, 1e-9)
        if high <= 1e-9:
            high = 0.05 if percent else 1.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    y = (low if zero else low - room, high + room)
    legend = 18.0 if len(lines) > 1 else 0.0
    frame = Frame(width, height, (min(steps), max(steps)), y, top=8.0 + legend)
    parts = [_axes(frame, percent)]
    for index, (name, series) in enumerate(lines.items()):
        shade = PALETTE[index % len(PALETTE)]
        places = [frame.at(s, v) for s, v in thinned(series)]
        if len(places) == 1:
            parts.append(
                f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{shade}"/>'
            )
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{shade}" stroke-width="1.8"'
            f' stroke-linejoin="round"><title>{escape(name)}</title></polyline>'
        )
    if legend:
        parts.append(_legend(list(lines), frame))
    return wrap_svg(width, height, title, parts)


def _axes(frame: Frame, percent: bool) -> str:
    parts = []
    for value in ticks(*frame.y, count=4):
        if not frame.y[0] <= value <= frame.y[1]:
            continue
        x, y = frame.at(frame.x[0], value)
        label = f"{100 * value:.3g}%" if percent else number(value)
        end = frame.width - frame.right
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{end:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    parts.append(step_axis(frame))
    return "".join(parts)


def step_axis(frame: Frame) -> str:
    """Labels of steps under a picture."""
    parts = []
    base = frame.height - frame.bottom
    for value in ticks(*frame.x, count=5):
        if value != int(value):
            continue
        x, _ = frame.at(value, frame.y[0])
        parts.append(f'<path d="M{x:.1f} {base:.1f}v4" stroke="#b7bcc4"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{base + 15:.1f}" text-anchor="middle">{number(value)}</text>'
        )
    parts.append(
        f'<text x="{frame.left - 6:.1f}" y="{base + 15:.1f}" text-anchor="end" class="quiet">'
        "step</text>"
    )
    return "".join(parts)


def _legend(names: Sequence[str], frame: Frame) -> str:
    parts = []
    x = frame.left
    for index, name in enumerate(names):
        shown = name if len(name) <= 22 else name[:21] + "\N{HORIZONTAL ELLIPSIS}"
        shade = PALETTE[index % len(PALETTE)]
        parts.append(f'<path d="M{x:.0f} 11h14" stroke="{shade}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 18:.0f}" y="14.5">{escape(shown)}</text>')
        x += 30 + 6.1 * len(shown)
    return "".join(parts)


def thinned(series: Series) -> Series:
    """At most about :data:`MOST_POINTS` points, peaks included."""
    size = -(-2 * len(series) // MOST_POINTS)
    if size <= 2:
        return series
    kept: Series = []
    for i in range(0, len(series), size):
        part = series[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def load_grid(
    rows: Sequence[tuple[str, str, Sequence[float] | None]],
    starving: set[tuple[int, int]],
    *,
    width: float = 1180.0,
    title: str,
) -> str:
    """One cell per expert, one row per layer; starving experts are framed, dead ones crossed.

    Args:
        rows: (label, full name, load ratios) of each layer; None for a layer without tokens.
        starving: (layer, expert).
        width: the width of the picture, in its own units.
        title: for screen readers.
    """
    left, top = 88.0, 4.0
    most = max((len(r) for _, _, r in rows if r is not None), default=1)
    cell = min(72.0, (width - left - 4) / most)
    width = left + most * cell + 4
    tall = max(13.0, min(34.0, cell * 0.7, 620.0 / max(1, len(rows))))
    gap = 1.0 if cell > 6 else 0.0
    parts, frames = [], []
    for i, (label, name, row) in enumerate(rows):
        y = top + i * tall
        parts.append(
            f'<text x="{left - 8}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">'
            f"<title>{escape(name)}</title>{escape(label)}</text>"
        )
        if row is None:
            parts.append(
                f'<text x="{left + 6}" y="{y + tall / 2 + 4:.1f}" class="quiet">no token</text>'
            )
            continue
        for e, ratio in enumerate(row):
            x = left + e * cell
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell - gap:.2f}"'
                f' height="{tall - gap:.2f}" fill="{hex_colour(ratio)}">'
                f"<title>layer {i} expert {e}: {ratio:.2f} of the mean load</title></rect>"
            )
            if cell >= 30 and tall >= 13:
                text = "dead" if ratio == 0 else f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
                parts.append(
                    f'<text x="{x + (cell - gap) / 2:.1f}" y="{y + tall / 2 + 3.5:.1f}"'
                    f' text-anchor="middle" class="cell" style="fill:{ink(ratio)}">{text}</text>'
                )
            elif ratio == 0 and cell >= 5:
                parts.append(
                    f'<path d="M{x + cell * 0.25:.1f} {y + tall * 0.25:.1f}L{x + cell * 0.75:.1f}'
                    f" {y + tall * 0.75:.1f}M{x + cell * 0.75:.1f} {y + tall * 0.25:.1f}"
                    f'L{x + cell * 0.25:.1f} {y + tall * 0.75:.1f}" stroke="#fff"/>'
                )
            if (i, e) in starving:
                frames.append(
                    f'<rect x="{x - gap / 2:.2f}" y="{y - gap / 2:.2f}" width="{cell:.2f}"'
                    f' height="{tall:.2f}" fill="none" stroke="#c1121f" stroke-width="2"/>'
                )
    base = top + len(rows) * tall
    for mark in ticks(0, most - 1, count=min(16, most)) if most > 1 else [0]:
        if mark == int(mark):
            x = left + (mark + 0.5) * cell
            parts.append(
                f'<text x="{x:.1f}" y="{base + 17:.1f}" text-anchor="middle" class="quiet">'
                f"{int(mark)}</text>"
            )
    parts.append(
        f'<text x="{left - 8}" y="{base + 17:.1f}" text-anchor="end" class="quiet">expert</text>'
    )
    inner = "".join([*parts, *frames])
    return wrap_svg(
        width, base + 24, title, [f'<g class="roomy">{inner}</g>' if tall > 24 else inner]
    )


def load_over_time(
    rows: Sequence[Sequence[float | None]],
    steps: tuple[int, int],
    starving: Iterable[int],
    *,
    title: str,
    width: float = 420.0,
) -> str:
    """One row per expert, steps from left to right; starving experts have a mark at the right.

    Args:
        rows: load ratios of each expert, one per column.
        steps: the first and the last step.
        starving: the starving experts.
        title: for screen readers.
        width: the width of the picture, in its own units.
    """
    tall = max(2.0, min(14.0, 230.0 / len(rows)))
    frame = Frame(
        width,
        4 + tall * len(rows) + 22,
        (steps[0], max(steps[1], steps[0] + 1)),
        (len(rows), 0.0),
        left=34.0,
        right=16.0,
        top=4.0,
    )
    across = width - frame.left - frame.right
    picture = base64.b64encode(png([[colour(x) for x in row] for row in rows])).decode()
    parts = [
        f'<image x="{frame.left}" y="{frame.top}" width="{across}" height="{tall * len(rows):.2f}"'
        f' preserveAspectRatio="none" style="image-rendering:pixelated"'
        f' href="data:image/png;base64,{picture}"/>'
    ]
    every = 1 if tall >= 11 else math.ceil(11 / tall)
    for e in range(0, len(rows), every):
        y = frame.top + (e + 0.5) * tall
        parts.append(f'<text x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{e}</text>')
    for e in starving:
        y = frame.top + (e + 0.5) * tall
        x = frame.left + across + 2
        parts.append(
            f'<path d="M{x} {y:.1f}l9 -4v8z" fill="#c1121f"><title>expert {e}</title></path>'
        )
    parts.append(step_axis(frame))
    return wrap_svg(width, frame.height, title, parts)


def png(rows: Sequence[Sequence[tuple[int, int, int]]]) -> bytes:
    """A picture of these pixels as a PNG file (RFC 2083)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    raw = b"".join(b"\0" + bytes(part for pixel in row for part in pixel) for row in rows)
    size = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b"")]
    )


def wrap_svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Wraps these elements in an ``<svg>`` element."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}"'
        f' style="max-width:{width * 1.15:.0f}px">' + "".join(parts) + "</svg>"
    )
