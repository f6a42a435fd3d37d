"""What the kernels of one step read and write: six grouped GEMMs and two sums."""

from __future__ import annotations

from figures.canvas import Canvas

WIDTH, HEIGHT = 900.0, 372.0
KERNEL, TENSOR = "a", "box"
H = 50.0
"""Height of a box."""


def draw() -> Canvas:
    """The forward pass above, the backward below; what is kept between them in the middle."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "The kernels of a step: up and down projections and a sum forward; four grouped GEMMs"
        " and a sum backward. Only x and H are kept.",
    )
    forward, kept, back, last = 42.0, 142.0, 206.0, 292.0

    def tensor(x: float, y: float, width: float, *lines: str) -> None:
        canvas.box(x, y, width, H, lines)

    def kernel(x: float, y: float, width: float, *lines: str) -> None:
        canvas.box(x, y, width, H, lines, KERNEL)

    canvas.text(20, 28, "forward", "title")
    tensor(20, forward, 92, "x", "T x D")
    kernel(150, forward, 190, "up + activation", "gathers rows of x")
    tensor(378, forward, 92, "A", "N x F")
    kernel(508, forward, 110, "down", "A to rows of y")
    kernel(648, forward, 124, "weighted sum", "K rows each")
    tensor(800, forward, 80, "y", "T x D")
    for x0, x1 in ((112, 150), (340, 378), (470, 508), (618, 648), (772, 800)):
        canvas.arrow(x0, forward + H / 2, x1, forward + H / 2)
    canvas.box(150, kept, 190, 40, ("H, before the activation",))
    canvas.arrow(245, forward + H, 245, kept)
    canvas.text(20, kept + 24, "kept: x and H", "small quiet")

    canvas.text(20, back + 18, "backward", "title")
    tensor(800, back, 80, "dy", "T x D")
    kernel(508, back, 264, "d_act: down, then activation", "gathers rows of dy, reads H")
    canvas.arrow(800, back + H / 2, 772, back + H / 2)
    canvas.line([(340, kept + 20), (640, kept + 20), (640, back)])
    canvas.tip(640, back, "down")
    tensor(378, back, 92, "dH", "over H")
    canvas.arrow(508, back + H / 2, 470, back + H / 2)
    kernel(150, back, 190, "d_rows", "dH to rows of dx")
    canvas.arrow(378, back + H / 2, 340, back + H / 2)
    kernel(150, last, 190, "sum", "K rows each")
    canvas.arrow(245, back + H, 245, last)
    tensor(20, last, 92, "dx", "T x D")
    canvas.arrow(150, last + H / 2, 112, last + H / 2)
    kernel(378, last, 150, "d_up", "gathers x, reads dH")
    canvas.arrow(424, back + H, 424, last)
    kernel(566, last, 206, "d_down", "gathers dy, reads weighted A")
    canvas.arrow(669, back + H, 669, last)
    canvas.text(
        WIDTH / 2,
        HEIGHT - 10,
        "Blue: kernels. N = T K rows, in expert order. d_act also writes the weighted A, and"
        " <A, dA> of each row for the routing weights.",
        "mid small quiet",
    )
    return canvas
