"""Boxes, arrows, bars and text as a small SVG that follows the reader's dark or light theme."""

from __future__ import annotations

from html import escape
from textwrap import dedent

STYLE = """
svg{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.page{fill:#fff;stroke:#d4d8de}
text{fill:#24292f}.quiet{fill:#57606a}.small{font-size:11px}.title{font-weight:600}
.mid{text-anchor:middle}.end{text-anchor:end}.on{fill:#fff}
.box{fill:#f3f5f8;stroke:#8c959f}.line{stroke:#57606a;fill:none}.tip{fill:#57606a}
.grid{stroke:#d4d8de}.none{fill:none;stroke-width:2}
.a{fill:#1f5fa8}.b{fill:#c2571a}.c{fill:#6e7781}.d{fill:#3c7d55}.e{fill:#7d539c}.f{fill:#8a6d1d}
.g{fill:#a33f6b}
.la{stroke:#1f5fa8}.lb{stroke:#c2571a}.lc{stroke:#6e7781}.ld{stroke:#3c7d55}
.le{stroke:#7d539c}
@media (prefers-color-scheme:dark){
.page{fill:#0d1117;stroke:#30363d}
text{fill:#e6edf3}.quiet{fill:#9da7b1}
.box{fill:#1b222b;stroke:#6e7681}.line{stroke:#9da7b1}.tip{fill:#9da7b1}.grid{stroke:#30363d}.none{fill:none}
.on{fill:#0d1117}
.a{fill:#6cb0ff}.b{fill:#f0955c}.c{fill:#a3adb8}.d{fill:#74c493}.e{fill:#c79be6}.f{fill:#d9b95b}
.g{fill:#e88db4}
.la{stroke:#6cb0ff}.lb{stroke:#f0955c}.lc{stroke:#a3adb8}.ld{stroke:#74c493}
.le{stroke:#c79be6}}
"""
"""``a`` to ``g`` are fills told apart for common colour blindness, ``la`` to ``le`` their lines.
The page is drawn too: what lies behind the picture does not matter."""


def number(value: float) -> str:
    """A coordinate: short, and the same on every machine."""
    return f"{value:.1f}".removesuffix(".0")


class Canvas:
    """Collects shapes; later ones cover earlier ones."""

    def __init__(self, width: float, height: float, title: str) -> None:
        """Starts an empty page.

        Args:
            width: width of the page, in pixels.
            height: height of the page, in pixels.
            title: what the picture says, for those who do not see it.
        """
        self.width, self.height, self.title = width, height, title
        self._shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, radius: float = 0
    ) -> None:
        """A rectangle with its upper left corner at (x, y)."""
        rounded = f' rx="{number(radius)}"' if radius else ""
        self._shapes.append(
            f'<rect class="{style}" x="{number(x)}" y="{number(y)}" width="{number(width)}"'
            f' height="{number(height)}"{rounded}/>'
        )

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """One line of text whose baseline starts at (x, y); ``mid`` and ``end`` move it left."""
        name = f' class="{style}"' if style else ""
        self._shapes.append(f'<text{name} x="{number(x)}" y="{number(y)}">{escape(text)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: tuple[str, ...],
        style: str = "box",
    ) -> None:
        """A rounded box; its first line is a title, the others are small."""
        self.rect(x, y, width, height, style, 6)
        filled = "" if style == "box" else " on"
        quiet = filled or " quiet"
        top = y + height / 2 - (len(lines) - 1) * 8 + 4.5
        for i, line in enumerate(lines):
            kind = f"mid title{filled}" if i == 0 else f"mid small{quiet}"
            self.text(x + width / 2, top + i * 16, line, kind)

    def line(self, points: list[tuple[float, float]], style: str = "line") -> None:
        """A polyline."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._shapes.append(f'<polyline class="{style}" points="{path}"/>')

    def curve(self, x0: float, y0: float, x1: float, y1: float, style: str = "line") -> None:
        """A curve that leaves and arrives vertically."""
        middle = (y0 + y1) / 2
        self._shapes.append(
            f'<path class="{style}" d="M{number(x0)} {number(y0)}C{number(x0)} {number(middle)}'
            f' {number(x1)} {number(middle)} {number(x1)} {number(y1)}"/>'
        )

    def sideways(self, x0: float, y0: float, x1: float, y1: float, style: str = "line") -> None:
        """A curve that leaves and arrives horizontally."""
        middle = (x0 + x1) / 2
        self._shapes.append(
            f'<path class="{style}" d="M{number(x0)} {number(y0)}C{number(middle)} {number(y0)}'
            f' {number(middle)} {number(y1)} {number(x1)} {number(y1)}"/>'
        )

    def tip(self, x: float, y: float, direction: str, style: str = "tip") -> None:
        """An arrow's head, its point at (x, y), looking "right", "left", "down" or "up"."""
        a, b = {
            "right": ((-7, -4), (-7, 4)),
            "left": ((7, -4), (7, 4)),
            "down": ((-4, -7), (4, -7)),
            "up": ((-4, 7), (4, 7)),
        }[direction]
        path = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in ((0, 0), a, b))
        self._shapes.append(f'<polygon class="{style}" points="{path}"/>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A straight arrow along one axis."""
        across, down = ("right" if x1 > x0 else "left"), ("down" if y1 > y0 else "up")
        self.line([(x0, y0), (x1, y1)])
        self.tip(x1, y1, across if y0 == y1 else down)

    def svg(self) -> str:
        """The whole file."""
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}'
            f' viewBox="0 0 {number(self.width)} {number(self.height)}" role="img">'
        )
        page = (
            f'<rect class="page" x=".5" y=".5" width="{number(self.width - 1)}"'
            f' height="{number(self.height - 1)}" rx="8"/>'
        )
        title = f"<title>{escape(self.title)}</title>"
        style = "<style>" + dedent(STYLE).strip() + "</style>"
        return "\n".join([head, title, style, page, *self._shapes, "</svg>"]) + "\n"
