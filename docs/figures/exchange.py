"""The forward pass of a layer with sharded experts in time, as "symmetric" exchanges tokens."""

from __future__ import annotations

from figures.canvas import Canvas

WIDTH, HEIGHT = 900.0, 268.0
LEFT, BAR = 120.0, 34.0
LANES = {"host": 46.0, "GPU": 102.0, "link out": 158.0, "link in": 206.0}
"""The upper edge of each lane."""


def draw() -> Canvas:
    """One rank's host, GPU and links; the others look the same at the same time."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "One rank's forward pass of a layer: rows and counts leave at once; the host launches the"
        " experts before it reads the counts, while rows travel, and the sums travel back.",
    )
    for name, y in LANES.items():
        canvas.text(LEFT - 14, y + 22, name, "end title")
        canvas.line([(LEFT, y + BAR + 5), (WIDTH - 20, y + BAR + 5)], "grid")

    def bar(lane: str, start: float, width: float, text: str, style: str) -> None:
        canvas.rect(LEFT + start, LANES[lane], width, BAR, style, 4)
        inside = "mid small on" if style != "box" else "mid small"
        canvas.text(LEFT + start + width / 2, LANES[lane] + 21, text, inside)

    canvas.text(
        LEFT,
        26,
        "forward pass of one layer; not to scale; the host's boxes are what it launches",
        "small quiet",
    )
    # Before the bars, which some of them pass behind.
    # The host goes on when everybody's counts are there; the experts when everybody's rows are.
    x = LEFT + 272
    canvas.line([(x, LANES["link in"]), (x, LANES["host"] + BAR)])
    canvas.tip(x, LANES["host"] + BAR, "up")
    x = LEFT + 346
    canvas.line([(x, LANES["link in"]), (x, LANES["GPU"] + BAR)])
    canvas.tip(x, LANES["GPU"] + BAR, "up")
    x = LEFT + 664
    canvas.line([(x, LANES["link in"] + 10), (x, LANES["GPU"] + BAR)])
    canvas.tip(x, LANES["GPU"] + BAR, "up")
    bar("host", 0, 150, "router, plan, push", "box")
    bar("host", 156, 104, "experts", "box")
    bar("host", 266, 112, "reads counts", "c")
    bar("host", 384, 96, "push sums", "box")
    bar("host", 486, 192, "goes on to the next layer", "box")
    bar("GPU", 30, 84, "router", "a")
    bar("GPU", 118, 76, "plan", "a")
    bar("GPU", 198, 134, "push rows", "b")
    bar("GPU", 346, 60, "order", "a")
    bar("GPU", 410, 146, "experts, sum per rank", "a")
    bar("GPU", 560, 92, "push sums", "b")
    bar("GPU", 666, 94, "sum over ranks", "a")
    bar("link out", 198, 56, "counts", "e")
    bar("link out", 258, 84, "rows", "b")
    bar("link out", 560, 98, "sums", "b")
    bar("link in", 214, 56, "counts", "e")
    bar("link in", 274, 72, "rows", "b")
    bar("link in", 568, 92, "sums", "b")
    return canvas
