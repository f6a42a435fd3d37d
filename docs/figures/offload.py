"""Tokens per second over tokens per pass, with the limits of the link and of the GPU."""

from __future__ import annotations

import math

from figures.canvas import Canvas
from figures.tables import DOCS, table

PAGE = DOCS / "benchmarks.md"
COLUMN = "tokens per pass"
WIDTH, HEIGHT = 760.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 24.0, 72.0, 46.0
EXPERTS_GB, LINK = 58.0, 55.6
"""What a pass copies, and GB/s of the link, in the run of the table."""
LARGEST, SMALLEST = 2**18, 2**12
SCALE = 60_000
SERIES = (
    ("resident: ms", "on the GPU as a whole", "c", "lc"),
    ("offloaded: ms", "experts in host memory", "a", "la"),
    ("ZeRO-Inference: ms", "ZeRO-Inference", "d", "ld"),
    ("Accelerate: ms", "Accelerate's cpu_offload", "b", "lb"),
)


def across(tokens: float) -> float:
    """The place of a number of tokens, on a logarithmic scale."""
    share = math.log2(tokens / SMALLEST) / math.log2(LARGEST / SMALLEST)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def up(rate: float) -> float:
    """The place of tokens per second."""
    return HEIGHT - BOTTOM - rate / SCALE * (HEIGHT - TOP - BOTTOM)


def draw() -> Canvas:
    """A line for each way, and what the link alone would allow."""
    title = "Scoring with Qwen3-30B-A3B's sizes: tokens per second over tokens per pass, one H200"
    canvas = Canvas(WIDTH, HEIGHT, title)
    canvas.text(16, 26, title, "title")
    x = LEFT
    for _, name, fill, _ in SERIES:
        canvas.rect(x, 39, 11, 11, fill, 2)
        canvas.text(x + 16, 49, name, "small")
        x += 6.2 * len(name) + 44
    for rate in range(0, SCALE + 1, 10_000):
        canvas.line([(LEFT, up(rate)), (WIDTH - RIGHT, up(rate))], "grid")
        canvas.text(LEFT - 8, up(rate) + 4, f"{rate // 1000}k" if rate else "0", "end small quiet")
    tokens = SMALLEST
    while tokens <= LARGEST:
        canvas.text(across(tokens), HEIGHT - 26, f"{tokens // 1024}k", "mid small quiet")
        tokens *= 2
    canvas.text(WIDTH / 2, HEIGHT - 9, "tokens per pass", "mid small")
    limit = [2 ** (quarter / 4) for quarter in range(48, 64)]  # up to 54 thousand tokens
    points = [(across(n), up(n * LINK / EXPERTS_GB)) for n in limit]
    canvas.line(points, "line")
    canvas.text(points[-1][0], points[-1][1] - 8, "limit of the link", "mid small quiet")
    for column, _, fill, line in SERIES:
        drawn = []
        for row in table(PAGE, COLUMN):
            if row[column]:
                tokens = int(row[COLUMN].replace(",", ""))
                rate = 1000 * tokens / float(row[column].replace(",", ""))
                drawn.append((across(tokens), up(rate)))
        canvas.line(drawn, f"{line} none")
        for px, py in drawn:
            canvas.rect(px - 3.5, py - 3.5, 7, 7, fill, 3.5)
    return canvas
