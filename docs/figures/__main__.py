"""Draws all pictures into docs/figures/: ``make figures``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from figures import architecture, dispatch, exchange, offload, speed, step
from figures.canvas import Canvas

FOLDER = Path(__file__).parent
FIGURES: dict[str, Callable[[], Canvas]] = {
    "architecture.svg": architecture.draw,
    "dispatch.svg": dispatch.draw,
    "exchange.svg": exchange.draw,
    "offload.svg": offload.draw,
    "peers.svg": speed.draw_peers,
    "speed.svg": speed.draw,
    "step.svg": step.draw,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw().svg(), encoding="utf-8")
        print(f"docs/figures/{name}")
