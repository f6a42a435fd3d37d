"""How tokens meet experts over ranks: two ranks, four experts, top 1."""

from __future__ import annotations

from figures.canvas import Canvas

RANKS = ((0, (0, 2, 1, 3)), (1, (3, 1, 0, 2)))
"""A rank and the expert that each of its tokens is sent to."""
EXPERTS_PER_RANK = 2
SHADES = "abde"
"""A colour for each expert; a token has that of its expert."""

TOKEN, PITCH = 22.0, 26.0
WIDTH, ROW, TOP = 860.0, 150.0, 62.0


def token(canvas: Canvas, x: float, y: float, name: str, expert: int) -> None:
    """One token: a small square in its expert's colour."""
    canvas.rect(x, y, TOKEN, TOKEN, SHADES[expert], 4)
    canvas.text(x + TOKEN / 2, y + 15, name, "mid small on")


def draw() -> Canvas:
    """Tokens of each rank, the experts' inputs after dispatch, and the outputs after combine."""
    canvas = Canvas(
        WIDTH,
        TOP + 2 * ROW + 40,
        "Each rank's tokens are dispatched to the ranks that own their experts, computed there, and"
        " combined on the rank they came from; everything but the experts is data parallel.",
    )
    heads = (
        (88, "a rank's tokens"),
        (252, "dispatch"),
        (430, "experts, sharded"),
        (608, "combine"),
        (757, "their outputs"),
    )
    for x, head in heads:
        canvas.text(x, 28, head, "mid title")
    canvas.text(252, 45, "all-to-all", "mid small quiet")
    canvas.text(608, 45, "all-to-all, weighted sum", "mid small quiet")
    arriving: dict[int, list[tuple[str, float, float]]] = {}
    for rank, chosen in RANKS:
        y = TOP + rank * ROW
        canvas.rect(14, y, WIDTH - 28, ROW - 16, "box", 8)
        canvas.text(26, y + 20, f"rank {rank}", "title")
        for i, expert in enumerate(chosen):
            name = "abcdefgh"[rank * len(chosen) + i]
            place = y + 26 + i * PITCH
            token(canvas, 96, place, name, expert)
            token(canvas, 746, place, name, expert)
            arriving.setdefault(expert, []).append((name, 96 + TOKEN, place + 11))
        canvas.text(26, y + 62, "router", "small quiet")
        canvas.text(26, y + 77, "picks an", "small quiet")
        canvas.text(26, y + 92, "expert for", "small quiet")
        canvas.text(26, y + 107, "each token", "small quiet")
    for expert, tokens in sorted(arriving.items()):
        rank, local = divmod(expert, EXPERTS_PER_RANK)
        y = TOP + rank * ROW + 12 + local * 58
        canvas.rect(364, y, 132, 52, "page", 6)
        canvas.text(430, y + 47, f"expert {expert}", "mid small")
        for i, (name, x0, y0) in enumerate(tokens):
            x = 372 + i * 94
            token(canvas, x, y + 8, name, expert)
            if i == 0:
                canvas.text(430, y + 24, "FFN", "mid small quiet")
            style = f"line l{SHADES[expert]}"
            canvas.sideways(x0 + 2, y0, 364, y + 14 + i * 10, style)
            canvas.sideways(496, y + 14 + i * 10, 744, y0, style)
            canvas.tip(364, y + 14 + i * 10, "right", SHADES[expert])
            canvas.tip(745, y0, "right", SHADES[expert])
    foot = TOP + 2 * ROW + 6
    for i, line in enumerate(
        (
            "Each expert lives on one rank of an expert parallel group, and sees the tokens of all"
            " of its ranks.",
            "Router, attention, embeddings and norms are data parallel over all ranks, by DeepSpeed"
            " ZeRO.",
        )
    ):
        canvas.text(WIDTH / 2, foot + 17 * i, line, "mid small quiet")
    return canvas
